//! Limits on open connections: in total, and per address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::telemetry::{self, ConnectionRefusal};

/// Counts the connections of one listener.
pub(super) struct ConnectionLimiter {
    total_max: usize,
    address_max: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// The right to one connection; returned when dropped.
pub(super) struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    address: IpAddr,
}

impl ConnectionLimiter {
    pub(super) fn new(total_max: usize, address_max: usize) -> Arc<Self> {
        Arc::new(Self { total_max, address_max, open: Mutex::default() })
    }

    /// A permit for a client at `address`, or the limit that it would exceed.
    pub(super) fn acquire(self: &Arc<Self>, address: IpAddr) -> Result<ConnectionPermit, ConnectionRefusal> {
        let address = network(address);
        let mut open = self.open.lock();
        if open.total >= self.total_max {
            return Err(ConnectionRefusal::Total);
        }
        let here = open.by_address.entry(address).or_default();
        if *here >= self.address_max {
            return Err(ConnectionRefusal::Address);
        }
        *here += 1;
        open.total += 1;
        telemetry::connections(1.0);
        Ok(ConnectionPermit { limiter: Arc::clone(self), address })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut open = self.limiter.open.lock();
        open.total -= 1;
        if let Some(here) = open.by_address.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                open.by_address.remove(&self.address);
            }
        }
        telemetry::connections(-1.0);
    }
}

/// What counts as one address: an IPv4 host, or an IPv6 /64 network, since a host may use any address of its
/// network.
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
    fn limits_hold_in_total_and_per_address_and_permits_come_back() {
        let limiter = ConnectionLimiter::new(3, 2);
        let one = limiter.acquire(at("192.0.2.1")).ok().unwrap();
        let _two = limiter.acquire(at("::ffff:192.0.2.1")).ok().unwrap();
        assert_eq!(limiter.acquire(at("192.0.2.1")).err(), Some(ConnectionRefusal::Address));
        let three = limiter.acquire(at("2001:db8::1")).ok().unwrap();
        assert_eq!(limiter.acquire(at("192.0.2.2")).err(), Some(ConnectionRefusal::Total));
        drop(one);
        let _four = limiter.acquire(at("2001:db8::ffff")).ok().unwrap();
        drop(three);
        let _five = limiter.acquire(at("2001:db8::2")).ok().unwrap();
        assert_eq!(limiter.open.lock().by_address.len(), 2);
    }

    #[test]
    fn a_host_with_a_network_of_addresses_counts_once() {
        let limiter = ConnectionLimiter::new(8, 1);
        let _one = limiter.acquire(at("2001:db8::1")).ok().unwrap();
        assert_eq!(limiter.acquire(at("2001:db8::abcd:1")).err(), Some(ConnectionRefusal::Address));
        assert!(limiter.acquire(at("2001:db8:0:1::1")).is_ok());
    }
}
