//! A simulated disk that loses power. It is a layer over real files that remembers what was synced.
//!
//! The files are real, so that maps are real too. Besides, the disk keeps what would survive of every file
//! and name. At a crash, random parts of what was not synced survive: a 512-byte sector is as it was after
//! any of the writes to it since the last sync, a file has any of the lengths that it had, and each change
//! of names has happened or not.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use thenar_index::Map;
use thenar_index::storage::{Files, Storage, StoredFile};

use crate::support::rows::Dice;

const SECTOR: usize = 512;

/// What goes wrong at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    /// The power fails: neither this operation nor any later one happens.
    PowerCut,
    /// The operation fails with this error; the first half of a write happens. Later operations succeed.
    Fails(io::ErrorKind),
    /// From here on the disk is full: every write fails.
    Full,
}

#[derive(Debug, Default)]
struct State {
    ops: u64,
    mishap: Option<(u64, Mishap)>,
    dead: bool,
    full: bool,
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Changes of names since the folder was synced. Each happens completely or not at all.
    name_changes: Vec<Vec<(String, Option<usize>)>>,
    identities: u64,
}

#[derive(Debug, Default)]
struct Inode {
    durable: Vec<u8>,
    /// Writes since the last sync.
    writes: Vec<(usize, Vec<u8>)>,
    /// All lengths since the last sync. The last one is the current length.
    lengths: Vec<usize>,
}

impl Inode {
    fn len(&self) -> usize {
        self.lengths.last().copied().unwrap_or(self.durable.len())
    }

    /// The file with all writes.
    fn whole(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (at, write) in &self.writes {
            if bytes.len() < at + write.len() {
                bytes.resize(at + write.len(), 0);
            }
            bytes[*at..at + write.len()].copy_from_slice(write);
        }
        bytes.resize(self.len(), 0);
        bytes
    }

    /// The file as a power cut may leave it.
    fn torn(&self, dice: &mut Dice) -> Vec<u8> {
        let reach = self.writes.iter().map(|(at, write)| at + write.len()).max().unwrap_or(0).max(self.durable.len());
        let mut bytes = self.durable.clone();
        bytes.resize(reach.max(self.len()).next_multiple_of(SECTOR), 0);
        for start in (0..bytes.len()).step_by(SECTOR) {
            let met: Vec<_> =
                self.writes.iter().filter(|(at, write)| *at < start + SECTOR && start < at + write.len()).collect();
            // None or all of the writes survive half of the time.
            let kept = match dice.below(4) {
                0 => 0,
                1 => met.len(),
                _ => dice.below(met.len() as u64 + 1) as usize,
            };
            for (at, write) in &met[..kept] {
                let (from, end) = ((*at).max(start), (at + write.len()).min(start + SECTOR));
                bytes[from..end].copy_from_slice(&write[from - at..end - at]);
            }
        }
        let len = match dice.below(self.lengths.len() as u64 + 1) as usize {
            0 => self.durable.len(),
            some => self.lengths[some - 1],
        };
        bytes.resize(len, 0);
        bytes
    }
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<State>>);

/// A disk with the contents of `dir`, all durable.
pub(crate) fn disk_of(dir: &Path) -> Disk {
    let disk = Disk::default();
    let mut state = disk.0.lock();
    state.identities = 0x1d00;
    for name in Files.list(dir).unwrap() {
        let inode = state.inodes.len();
        state.inodes.push(Inode { durable: fs::read(dir.join(&name)).unwrap(), ..Inode::default() });
        state.names.insert(name.clone(), inode);
        state.durable_names.insert(name, inode);
    }
    drop(state);
    disk
}

impl Disk {
    /// Plans `mishap` for the operation with this number. The first operation is 0.
    pub(crate) fn plan(&self, op: u64, mishap: Mishap) {
        self.0.lock().mishap = Some((op, mishap));
    }

    /// Number of operations so far.
    pub(crate) fn ops(&self) -> u64 {
        self.0.lock().ops
    }

    /// Whether the power has failed.
    pub(crate) fn is_dead(&self) -> bool {
        self.0.lock().dead
    }

    /// Writes into `dir` what a power cut would leave now.
    pub(crate) fn leave(&self, dir: &Path, seed: u64) {
        let state = self.0.lock();
        let mut dice = Dice(seed);
        let mut names = state.durable_names.clone();
        for change in &state.name_changes {
            if dice.below(2) == 0 {
                continue;
            }
            for (name, inode) in change {
                match inode {
                    Some(inode) => names.insert(name.clone(), *inode),
                    None => names.remove(name),
                };
            }
        }
        for (name, inode) in names {
            fs::write(dir.join(name), state.inodes[inode].torn(&mut dice)).unwrap();
        }
    }

    /// Counts an operation. The error says whether the first half of a write happens.
    fn turn(&self, state: &mut State, writes: bool) -> Result<(), (io::Error, bool)> {
        let op = state.ops;
        state.ops += 1;
        match state.mishap {
            Some((at, Mishap::PowerCut)) if at == op => state.dead = true,
            Some((at, Mishap::Fails(kind))) if at == op => return Err((kind.into(), true)),
            Some((at, Mishap::Full)) if at == op => state.full = true,
            _ => {}
        }
        if state.dead {
            return Err((io::Error::other("the power has failed"), false));
        }
        if state.full && writes {
            return Err((io::ErrorKind::StorageFull.into(), true));
        }
        Ok(())
    }

    fn name(path: &Path) -> String {
        path.file_name().unwrap().to_str().unwrap().to_owned()
    }
}

impl Storage for Disk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        let mut state = self.0.lock();
        self.turn(&mut state, true).map_err(|(error, _)| error)?;
        let real = Files.create(path)?;
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.names.insert(Self::name(path), inode);
        state.name_changes.push(vec![(Self::name(path), Some(inode))]);
        Ok(Box::new(DiskFile { disk: self.clone(), inode, real }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        let mut state = self.0.lock();
        self.turn(&mut state, false).map_err(|(error, _)| error)?;
        let real = Files.open(path)?;
        let inode = state.names[&Self::name(path)];
        Ok(Box::new(DiskFile { disk: self.clone(), inode, real }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        self.turn(&mut state, false).map_err(|(error, _)| error)?;
        Files.rename(from, to)?;
        let inode = state.names.remove(&Self::name(from)).unwrap();
        state.names.insert(Self::name(to), inode);
        state.name_changes.push(vec![(Self::name(from), None), (Self::name(to), Some(inode))]);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        self.turn(&mut state, false).map_err(|(error, _)| error)?;
        Files.remove(path)?;
        state.names.remove(&Self::name(path)).unwrap();
        state.name_changes.push(vec![(Self::name(path), None)]);
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        self.turn(&mut state, false).map_err(|(error, _)| error)?;
        state.name_changes.clear();
        let names = state.names.clone();
        state.durable_names = names;
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.turn(&mut self.0.lock(), false).map_err(|(error, _)| error)?;
        Files.list(dir)
    }

    fn fresh_identity(&self) -> u64 {
        let mut state = self.0.lock();
        state.identities += 1;
        state.identities
    }
}

#[derive(Debug)]
struct DiskFile {
    disk: Disk,
    inode: usize,
    real: Box<dyn StoredFile>,
}

impl DiskFile {
    fn turn(&self, writes: bool) -> Result<(), (io::Error, bool)> {
        self.disk.turn(&mut self.disk.0.lock(), writes)
    }

    fn keep(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.real.write_at(bytes, at)?;
        let inode = &mut self.disk.0.lock().inodes[self.inode];
        let end = inode.len().max(at as usize + bytes.len());
        inode.lengths.push(end);
        inode.writes.push((at as usize, bytes.to_vec()));
        Ok(())
    }
}

impl StoredFile for DiskFile {
    fn size(&self) -> io::Result<u64> {
        self.turn(false).map_err(|(error, _)| error)?;
        self.real.size()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.turn(false).map_err(|(error, _)| error)?;
        self.real.read_at(bytes, at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self.turn(true) {
            Ok(()) => self.keep(bytes, at),
            Err((error, half)) => {
                if half {
                    // A system stops between sectors (in fact pages), not within one.
                    let stop = (at as usize + bytes.len() / 2) / SECTOR * SECTOR;
                    self.keep(&bytes[..stop.saturating_sub(at as usize)], at)?;
                }
                Err(error)
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.turn(false).map_err(|(error, _)| error)?;
        self.real.set_len(len)?;
        self.disk.0.lock().inodes[self.inode].lengths.push(len as usize);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.turn(false).map_err(|(error, _)| error)?;
        let inode = &mut self.disk.0.lock().inodes[self.inode];
        inode.durable = inode.whole();
        inode.writes.clear();
        inode.lengths.clear();
        Ok(())
    }

    fn map(&self, len: usize) -> io::Result<Map> {
        self.turn(false).map_err(|(error, _)| error)?;
        self.real.map(len)
    }
}
