//! Plots as SVG: throughput against recall, latency against the size of the gallery or over time.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

/// Size of one panel.
const PANEL: (u32, u32) = (640, 420);

/// Series with more points are lines without dots.
const DOTS_MAX: usize = 12;

/// What the horizontal axis measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// From 0 to 1.
    Share,
    /// From 0 on.
    Linear,
    /// Logarithmic.
    Logarithmic,
}

/// A named set of points; a line where there are several of one name to join.
#[derive(Debug, Clone)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// Horizontal and vertical.
    pub points: Vec<(f64, f64)>,
}

/// One diagram. The vertical axis is logarithmic.
#[derive(Debug, Clone)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Under the horizontal axis.
    pub across: &'static str,
    /// Beside the vertical axis.
    pub up: &'static str,
    /// How the horizontal axis is divided.
    pub axis: Axis,
    /// What it shows.
    pub series: Vec<Series>,
}

/// Draws the panels under each other.
///
/// # Errors
/// Where the file cannot be written.
pub fn draw(path: &Path, panels: &[Panel]) -> anyhow::Result<()> {
    std::fs::write(path, svg(panels)?).with_context(|| format!("cannot write {}", path.display()))
}

/// The panels under each other, as the text of an SVG.
///
/// # Errors
/// Where they cannot be drawn.
pub fn svg(panels: &[Panel]) -> anyhow::Result<String> {
    let mut text = String::new();
    let height = PANEL.1 * u32::try_from(panels.len().max(1))?;
    let area = SVGBackend::with_string(&mut text, (PANEL.0, height)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw a plot: {error}");
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    for (part, panel) in area.split_evenly((panels.len().max(1), 1)).iter().zip(panels) {
        one(part, panel).map_err(|error| failed(&error))?;
    }
    area.present().map_err(|error| failed(&error))?;
    drop(area);
    Ok(text)
}

/// The least and the largest of some numbers, with room around them.
fn span(values: impl Iterator<Item = f64> + Clone, room: f64) -> std::ops::Range<f64> {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let largest = values.fold(0.0, f64::max);
    least / room..largest * room
}

fn one(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let points = || panel.series.iter().flat_map(|series| series.points.iter());
    if points().next().is_none() {
        return Ok(());
    }
    let up = span(points().map(|point| point.1), 1.6).log_scale();
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(&panel.title, ("sans-serif", 16))
        .margin(12)
        .margin_right(190)
        .x_label_area_size(42)
        .y_label_area_size(64);
    match panel.axis {
        Axis::Logarithmic => {
            let across = span(points().map(|point| point.0), 1.2).log_scale();
            fill(&mut builder.build_cartesian_2d(across, up)?, area, panel)
        }
        Axis::Linear => {
            let most = points().fold(0.0, |most: f64, point| most.max(point.0));
            fill(&mut builder.build_cartesian_2d(0.0..most.max(1.0), up)?, area, panel)
        }
        Axis::Share => fill(&mut builder.build_cartesian_2d(-0.02..1.04, up)?, area, panel),
    }
}

fn fill<X: Ranged<ValueType = f64> + ValueFormatter<f64>, Y: Ranged<ValueType = f64> + ValueFormatter<f64>>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    chart.configure_mesh().x_desc(panel.across).y_desc(panel.up).light_line_style(BLACK.mix(0.06)).draw()?;
    for (number, series) in panel.series.iter().enumerate() {
        let colour = Palette99::pick(number).to_rgba();
        if series.points.len() > 1 {
            chart.draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))?;
        }
        if series.points.len() <= DOTS_MAX {
            chart.draw_series(series.points.iter().map(|point| Circle::new(*point, 5, colour.filled())))?;
        }
        // A legend of its own beside the diagram: points of peers lie close together.
        let (x, y) = (PANEL.0.cast_signed() - 180, 44 + 20 * i32::try_from(number).unwrap_or(0));
        area.draw(&Circle::new((x, y), 5, colour.filled()))?;
        area.draw(&Text::new(series.name.clone(), (x + 12, y - 7), ("sans-serif", 13)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_names_its_series_and_axes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let panel = |axis| Panel {
            title: "batches of 256".to_owned(),
            across: "recall",
            up: "searches a second",
            axis,
            series: vec![
                Series { name: "Thenar".to_owned(), points: vec![(1.0, 900.0), (0.5, 30.0)] },
                Series { name: "FAISS Flat".to_owned(), points: vec![(1.0, 300.0)] },
            ],
        };
        draw(&path, &[panel(Axis::Share), panel(Axis::Linear), panel(Axis::Logarithmic)]).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        assert!(
            ["Thenar", "FAISS Flat", "recall", "searches a second", "batches of 256"].iter().all(|w| svg.contains(w))
        );
        assert_eq!(svg.matches("<circle").count(), 3 * (3 + 2), "a point each, and one in the legend");
    }
}
