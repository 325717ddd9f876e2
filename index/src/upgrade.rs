//! From an earlier format to the present one: segments are given codes, in place.
//!
//! A segment of version 1 ends with its rows; one of version 2 has codes behind them, but no
//! sketches, and is treated as if it had none. A file is made longer, the codes of its full blocks
//! are written over whatever is there, zeros over those of the others, and all is synced. Then one
//! manifest of the present version makes them count, all at once. Until it is durable the old
//! manifest stands, under which what lies behind the rows means nothing; cut short, it begins anew.
//!
//! Headers are left as they are, because a header page spans sectors that a power cut can tear
//! apart: under a manifest of version 3 a segment with an earlier header is one that was extended.

use std::time::Duration;

use crate::codes::BLOCK_ROWS;
use crate::coding::code_blocks_in_parallel;
use crate::error::Error;
use crate::format::VERSION;
use crate::open::Unrepaired;

/// Blocks coded between two words of progress: 64 Ki rows.
const STEP_BLOCKS: u32 = 1024;

impl Unrepaired {
    /// The format of the index in its folder, until [`Unrepaired::finish`] makes it the present
    /// one, [`VERSION`].
    #[must_use]
    pub fn version(&self) -> u32 {
        self.manifest.version
    }

    /// Gives codes to segments that have none of this version, and the manifest the present version:
    /// whoever calls writes it. Says whether there was something to do.
    pub(crate) fn upgrade(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<bool, Error> {
        if self.manifest.version == VERSION {
            return Ok(false);
        }
        let total = self.manifest.segments.iter().map(|entry| u64::from(entry.rows)).sum();
        let mut done = 0;
        for part in &mut self.parts {
            let (segment, _) = part.found.as_mut().expect("no segment is damaged");
            // One that was replaced on the way has its codes.
            if !segment.pages.layout().is_coded() {
                segment.pages.extend()?;
                let full = part.entry.rows / BLOCK_ROWS as u32;
                for first in (0..full).step_by(STEP_BLOCKS as usize) {
                    let blocks = first..full.min(first + STEP_BLOCKS);
                    let rows = u64::from(blocks.end) * BLOCK_ROWS as u64;
                    code_blocks_in_parallel(&segment.pages, segment.identity, blocks, &mut self.writer)?;
                    progress(done + rows, total);
                }
                // Nobody reads yet, so this does not wait.
                let mut quiet = self.writer.quiet(Duration::ZERO)?;
                for block in full..segment.pages.layout().blocks() {
                    segment.pages.scrub_codes(block, &mut quiet)?;
                }
                drop(quiet);
                segment.pages.sync()?;
            }
            done += u64::from(part.entry.rows);
            progress(done, total);
        }
        self.manifest.version = VERSION;
        Ok(true)
    }
}
