//! Tables for people, on stdout.

use std::io::Write as _;

use comfy_table::{CellAlignment, Table, presets};

/// A table with `header`, its columns from `numbers_from` on aligned to the right.
#[must_use]
pub fn table(header: &[&str], numbers_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for at in numbers_from..header.len() {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Names and values in two columns, without a header.
#[must_use]
pub fn facts(rows: &[(&str, String)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row(vec![(*name).to_owned(), value.clone()]);
    }
    table
}

/// Writes a line to stdout. Unlike `println!`, a reader that went away is an error, not a panic.
///
/// # Errors
/// Where stdout cannot be written.
pub fn say(text: impl std::fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")
}

/// Writes one JSON object on a line of its own.
///
/// # Errors
/// Where stdout cannot be written.
pub fn say_json(value: &impl serde::Serialize) -> std::io::Result<()> {
    say(serde_json::to_string(value)?)
}

/// `count` with its digits in groups of three.
#[must_use]
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_from_the_right() {
        let told: Vec<String> = [0, 12, 999, 1000, 12_345, 1_000_000].into_iter().map(grouped).collect();
        assert_eq!(told, ["0", "12", "999", "1,000", "12,345", "1,000,000"]);
    }

    #[test]
    fn a_table_keeps_every_cell() {
        let mut table = table(&["row", "score"], 1);
        table.add_row(vec!["1", "0.75"]);
        let text = table.to_string();
        assert!(["row", "score", "0.75"].iter().all(|cell| text.contains(cell)), "{text}");
        assert!(facts(&[("uptime", "3 s".to_owned())]).to_string().contains("uptime"));
    }
}
