//! Who may have a connection: limits in total and per address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::telemetry;
use crate::telemetry::ConnectionRefusal as Full;

/// The connections of one listener.
pub(super) struct Slots {
    total_max: usize,
    address_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// The right to one connection, given back when dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    address: IpAddr,
}

impl Slots {
    pub(super) fn new(total_max: usize, address_max: usize) -> Arc<Self> {
        Arc::new(Self { total_max, address_max, taken: Mutex::default() })
    }

    /// A slot for a client at `address`, or the limit that it would exceed.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Slot, Full> {
        let address = network(address);
        let mut taken = self.taken.lock();
        if taken.total >= self.total_max {
            return Err(Full::Total);
        }
        let here = taken.by_address.entry(address).or_default();
        if *here >= self.address_max {
            return Err(Full::Address);
        }
        *here += 1;
        taken.total += 1;
        telemetry::connections(1.0);
        Ok(Slot { slots: Arc::clone(self), address })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
        taken.total -= 1;
        if let Some(here) = taken.by_address.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                taken.by_address.remove(&self.address);
            }
        }
        telemetry::connections(-1.0);
    }
}

/// What counts as one address: a host of IPv4, a /64 network of IPv6, of which a host may use any.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn limits_hold_in_total_and_per_address_and_slots_come_back() {
        let slots = Slots::new(3, 2);
        let one = slots.take(at("192.0.2.1")).ok().unwrap();
        let _two = slots.take(at("::ffff:192.0.2.1")).ok().unwrap();
        assert_eq!(slots.take(at("192.0.2.1")).err(), Some(Full::Address));
        let three = slots.take(at("2001:db8::1")).ok().unwrap();
        assert_eq!(slots.take(at("192.0.2.2")).err(), Some(Full::Total));
        drop(one);
        let _four = slots.take(at("2001:db8::ffff")).ok().unwrap();
        drop(three);
        let _five = slots.take(at("2001:db8::2")).ok().unwrap();
        assert_eq!(slots.taken.lock().by_address.len(), 2);
    }

    #[test]
    fn a_host_with_a_network_of_addresses_is_one() {
        let slots = Slots::new(8, 1);
        let _one = slots.take(at("2001:db8::1")).ok().unwrap();
        assert_eq!(slots.take(at("2001:db8::abcd:1")).err(), Some(Full::Address));
        assert!(slots.take(at("2001:db8:0:1::1")).is_ok());
    }
}
