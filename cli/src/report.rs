//! Reports of experiments: one HTML file with tables and plots (SVG) that needs nothing else, in light and dark.

use crate::output::Error;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A report in the making. The file appears under its name when it is complete.
pub struct Report {
    path: PathBuf,
    file: NamedTempFile,
    title: String,
    body: String,
}

/// A plot: its axes and what is drawn between them.
pub struct Plot {
    pub title: &'static str,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

/// An axis.
pub struct Axis {
    pub label: &'static str,
    /// Equal distances are equal ratios. Values that are not positive are left out.
    pub is_log: bool,
}

/// Points that belong together.
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
    pub style: Style,
}

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A line joins the points.
    Line,
    /// Each point has its label beside it.
    Labelled,
    /// Points alone.
    Dots,
}

pub struct Point {
    pub x: f64,
    pub y: f64,
    /// Shown beside or on pointing at it.
    pub label: String,
}

const STYLE: &str = "\
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#d5dae0;--band:#f4f6f8;--c0:#0b62c4;--c1:#c2410c;
--c2:#117a44;--c3:#8b2fb8;--c4:#8a6100;--c5:#b01657;--c6:#0a7285;--c7:#4c5566;--good:#117a44;--fair:#8a6100;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--soft:#a3adb8;--line:#363d46;--band:#1d2228;--c0:#6cb0ff;
--c1:#ff9a62;--c2:#5fd08f;--c3:#d39bf5;--c4:#e3bb55;--c5:#ff8ab8;--c6:#57cfe0;--c7:#b3bcc8;--good:#5fd08f;--fair:#e3bb55;--bad:#ff8f85}}
body{margin:2rem auto;max-width:72rem;padding:0 1rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}p{max-width:46rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600}tbody tr:nth-child(even){background:var(--band)}
.identical,.proven{color:var(--good);font-weight:600}.near{color:var(--fair);font-weight:600}.broken,.wrong{color:var(--bad);font-weight:600}
figure{margin:1.2rem 0}figcaption{font-weight:600;margin-bottom:.3rem}svg{max-width:100%;height:auto;font:13px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line);fill:none}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.3rem 0;font-size:.9rem}
blockquote{margin:.3rem 0;padding:.3rem .8rem;border-left:3px solid var(--line);white-space:pre-wrap}
mark{background:none;color:var(--bad);text-decoration:underline}details{margin:.5rem 0}summary{cursor:pointer}
";

impl Report {
    /// Begins a report that will be written to `path`; a directory that cannot be written to is found now.
    pub fn new(path: &Path, title: impl Into<String>) -> Result<Self, Error> {
        let problem = |e: std::io::Error| Error::from(format!("{}: {e}", path.display()));
        if path.is_dir() {
            return Err(format!("{}: it is a directory; name the HTML file to write", path.display()).into());
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = NamedTempFile::new_in(dir).map_err(problem)?;
        Ok(Self { path: path.into(), file, title: title.into(), body: String::new() })
    }

    pub fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(text));
    }

    pub fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
    }

    /// A table; the first column names the row. A cell that is one of the classes of the style takes its colour.
    pub fn table(&mut self, caption: &str, headers: &[&str], rows: &[Vec<String>]) {
        let _ = write!(self.body, "<div class=\"wide\"><table><caption>{}</caption><thead><tr>", escape(caption));
        for header in headers {
            let _ = write!(self.body, "<th scope=\"col\">{}</th>", escape(header));
        }
        self.body += "</tr></thead><tbody>\n";
        for row in rows {
            self.body += "<tr>";
            for (i, cell) in row.iter().enumerate() {
                let text = escape(cell);
                let _ = match (i, cell.as_str()) {
                    (0, _) => write!(self.body, "<th scope=\"row\">{text}</th>"),
                    (_, "identical" | "near" | "broken" | "proven" | "wrong") => {
                        write!(self.body, "<td class=\"{text}\">{text}</td>")
                    }
                    _ => write!(self.body, "<td>{text}</td>"),
                };
            }
            self.body += "</tr>\n";
        }
        self.body += "</tbody></table></div>\n";
    }

    pub fn plot(&mut self, plot: &Plot) {
        self.body += &plot.to_html();
    }

    /// A text under a summary that unfolds it, with what comes after its first `n_same` characters marked.
    pub fn text(&mut self, name: &str, text: &str, n_same: usize) {
        let at = text.char_indices().nth(n_same).map_or(text.len(), |(at, _)| at);
        let (same, other) = (escape(&text[..at]), escape(&text[at..]));
        let other = if other.is_empty() { other } else { format!("<mark>{other}</mark>") };
        let _ = writeln!(self.body, "<p>{}</p><blockquote>{same}{other}</blockquote>", escape(name));
    }

    /// Opens a part that is folded at first.
    pub fn fold(&mut self, summary: &str) {
        let _ = writeln!(self.body, "<details><summary>{}</summary>", escape(summary));
    }

    pub fn end_fold(&mut self) {
        self.body += "</details>\n";
    }

    /// Writes the file, with `data` as JSON inside (element `data`).
    pub fn finish(mut self, data: &impl Serialize) -> Result<(), Error> {
        // `<` would end the element early, were it to stand before `/script`.
        let json = serde_json::to_string(data)?.replace('<', "\\u003c");
        let title = escape(&self.title);
        let html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n<style>{STYLE}</style></head><body>\n\
             <h1>{title}</h1>\n{}<script type=\"application/json\" id=\"data\">{json}</script>\n</body></html>\n",
            self.body
        );
        let problem = |e: std::io::Error| format!("{}: {e}", self.path.display());
        self.file.write_all(html.as_bytes()).map_err(problem)?;
        let mut permissions = self.file.as_file().metadata().map_err(problem)?.permissions();
        #[cfg(unix)]
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        #[cfg(not(unix))]
        permissions.set_readonly(false);
        self.file.as_file().set_permissions(permissions).map_err(problem)?;
        self.file.persist(&self.path).map_err(|e| problem(e.error))?;
        Ok(())
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
/// Room for the axes' labels: left, right, top, bottom.
const MARGIN: [f64; 4] = [76.0, 24.0, 12.0, 52.0];

impl Plot {
    fn to_html(&self) -> String {
        let drawn = |p: &&Point| {
            let fits = |axis: &Axis, v: f64| v.is_finite() && (v > 0.0 || !axis.is_log);
            fits(&self.x, p.x) && fits(&self.y, p.y)
        };
        let all: Vec<&Point> = self.series.iter().flat_map(|s| &s.points).filter(drawn).collect();
        if all.is_empty() {
            return String::new();
        }
        let x = Scale::new(&self.x, all.iter().map(|p| p.x), MARGIN[0], WIDTH - MARGIN[1]);
        let y = Scale::new(&self.y, all.iter().map(|p| p.y), HEIGHT - MARGIN[3], MARGIN[2]);
        let (left, right, top, bottom) = (MARGIN[0], WIDTH - MARGIN[1], MARGIN[2], HEIGHT - MARGIN[3]);
        let mut svg = format!(
            "<figure><figcaption>{title}</figcaption>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" role=\"img\" aria-label=\"{title}: {} against {}, for {}\">\n",
            escape(self.y.label),
            escape(self.x.label),
            escape(&self.series.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ")),
            title = escape(self.title),
        );
        for tick in x.ticks() {
            let at = x.place(tick);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{at:.1} {top}V{bottom}\"/><text class=\"soft\" x=\"{at:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                number(tick)
            );
        }
        for tick in y.ticks() {
            let at = y.place(tick);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/><text class=\"soft\" x=\"{}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                left - 8.0,
                at + 4.0,
                number(tick)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n<text transform=\"translate(16 {}) rotate(-90)\" \
             text-anchor=\"middle\">{}</text>",
            (left + right) / 2.0,
            HEIGHT - 10.0,
            escape(self.x.label),
            (top + bottom) / 2.0,
            escape(self.y.label)
        );
        let mut labels = Labels { taken: all.iter().map(|p| around(x.place(p.x), y.place(p.y))).collect() };
        for (i, series) in self.series.iter().enumerate() {
            let colour = format!("var(--c{})", i % 8);
            let points: Vec<(f64, f64, &Point)> =
                series.points.iter().filter(drawn).map(|p| (x.place(p.x), y.place(p.y), p)).collect();
            if series.style == Style::Line && points.len() > 1 {
                let path: Vec<String> = points.iter().map(|(x, y, _)| format!("{x:.1} {y:.1}")).collect();
                let _ = writeln!(
                    svg,
                    "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                    path.join("L")
                );
            }
            for (px, py, point) in points {
                let label = escape(&point.label);
                let _ =
                    writeln!(svg, "<path d=\"{}\" fill=\"{colour}\"><title>{label}</title></path>", marker(i, px, py));
                if series.style == Style::Labelled {
                    let (tx, ty, anchor) = labels.place(px, py, point.label.chars().count(), left, right);
                    let _ = writeln!(svg, "<text x=\"{tx:.1}\" y=\"{ty:.1}\" text-anchor=\"{anchor}\">{label}</text>");
                }
            }
        }
        svg += "</svg>\n<ul class=\"legend\">";
        for (i, series) in self.series.iter().enumerate() {
            let _ = write!(
                svg,
                "<li><svg width=\"14\" height=\"14\" aria-hidden=\"true\"><path d=\"{}\" fill=\"var(--c{})\"/></svg> {}</li>",
                marker(i, 7.0, 7.0),
                i % 8,
                escape(&series.name)
            );
        }
        svg + "</ul></figure>\n"
    }
}

/// Places that are taken by markers and labels: left, right, top, bottom.
struct Labels {
    taken: Vec<[f64; 4]>,
}

/// A marker's place.
fn around(x: f64, y: f64) -> [f64; 4] {
    [x - 5.0, x + 5.0, y - 5.0, y + 5.0]
}

impl Labels {
    /// Where a label of so many characters beside a marker covers least: x, y, and what x is of the text.
    fn place(&mut self, x: f64, y: f64, n_chars: usize, left: f64, right: f64) -> (f64, f64, &'static str) {
        /// About what 13 pixels of a sans-serif take.
        const CHARACTER: f64 = 7.2;
        let width = CHARACTER * n_chars as f64;
        let places =
            [(-5.0, 9.0), (-5.0, -9.0), (14.0, 9.0), (14.0, -9.0), (-20.0, 9.0), (28.0, 9.0)].map(|(dy, dx)| {
                let start = if dx > 0.0 { x + dx } else { x + dx - width };
                let place = [start, start + width, y + dy - 11.0, y + dy + 3.0];
                (place, (x + dx, y + dy, if dx > 0.0 { "start" } else { "end" }))
            });
        let cost = |place: &[f64; 4]| {
            let overlap = |t: &[f64; 4], a: usize, b: usize| (t[b].min(place[b]) - t[a].max(place[a])).max(0.0);
            let covered: f64 = self.taken.iter().map(|t| overlap(t, 0, 1) * overlap(t, 2, 3)).sum();
            covered + 1000.0 * ((left - place[0]).max(0.0) + (place[1] - right).max(0.0))
        };
        let cheapest = places.iter().min_by(|(a, _), (b, _)| cost(a).total_cmp(&cost(b)));
        let (place, at) = *cheapest.expect("there are several places");
        self.taken.push(place);
        at
    }
}

/// A marker's outline: series differ in shape, not in colour alone.
fn marker(series: usize, x: f64, y: f64) -> String {
    match series % 4 {
        0 => format!("M{:.1} {y:.1}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0", x - 4.5),
        1 => format!("M{:.1} {:.1}h8v8h-8z", x - 4.0, y - 4.0),
        2 => format!("M{x:.1} {:.1}l5 9h-10z", y - 5.5),
        _ => format!("M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z", y - 5.5),
    }
}

/// From values to places.
struct Scale {
    is_log: bool,
    /// Of the axis, logarithms where it is logarithmic.
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, start: f64, end: f64) -> Self {
        let of = |v: f64| if axis.is_log { v.log10() } else { v };
        let (low, high) =
            values.map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let room = if high > low { 0.06 * (high - low) } else { 0.5 };
        Self { is_log: axis.is_log, low: low - room, high: high + room, start, end }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if self.is_log { value.log10() } else { value };
        self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> Vec<f64> {
        let is_in = |v: &f64| (self.low..=self.high).contains(v);
        if self.is_log && self.high - self.low > 0.9 {
            let step = ((self.high - self.low) / 8.0).ceil().max(1.0) as i32;
            let digits: &[f64] = if self.high - self.low < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let decades = (self.low.floor() as i32..=self.high.ceil() as i32).step_by(step as usize);
            let ticks = decades.flat_map(|d| digits.iter().map(move |m| m * 10f64.powi(d)));
            return ticks.filter(|v| is_in(&v.log10())).collect();
        }
        let (low, high) =
            if self.is_log { (10f64.powf(self.low), 10f64.powf(self.high)) } else { (self.low, self.high) };
        let rough = (high - low) / 7.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(10.0 * power);
        let first = (low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|v| *v <= high).collect()
    }
}

/// A tick's number: as short as it may be.
fn number(v: f64) -> String {
    if v == 0.0 || (1e-4..1e6).contains(&v.abs()) {
        let text = format!("{v:.6}");
        text.trim_end_matches('0').trim_end_matches('.').into()
    } else {
        format!("{v:.0e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64)], is_log: bool) -> String {
        let points = points.iter().map(|&(x, y)| Point { x, y, label: format!("<{x}>") }).collect();
        let series = vec![Series { name: "a & b".into(), points, style: Style::Line }];
        let axis = |is_log| Axis { label: "bits", is_log };
        Plot { title: "t", x: axis(false), y: axis(is_log), series }.to_html()
    }

    #[test]
    fn plots_place_their_points_and_escape_their_texts() {
        let svg = plot(&[(2.0, 0.1), (4.0, 0.001), (5.0, 0.0)], true);
        assert_eq!(svg.matches("<title>").count(), 2, "a zero has no place on a logarithmic axis");
        assert!(svg.contains("&lt;2&gt;") && svg.contains("a &amp; b") && !svg.contains("NaN"), "{svg}");
        assert!(!plot(&[(3.0, 1.0)], true).contains("NaN"), "one point");
        assert_eq!(plot(&[], false), "");
        assert_eq!(plot(&[(1.0, f64::NAN)], false), "");
    }

    #[test]
    fn labels_keep_out_of_each_other() {
        let mut labels = Labels { taken: vec![around(100.0, 50.0), around(104.0, 52.0)] };
        let first = labels.place(100.0, 50.0, 4, 0.0, 400.0);
        assert_eq!(first, (109.0, 45.0, "start"));
        assert_eq!(labels.place(104.0, 52.0, 4, 0.0, 400.0), (95.0, 47.0, "end"), "on the right is the first");
        assert_eq!(Labels { taken: vec![] }.place(390.0, 50.0, 9, 0.0, 400.0).2, "end", "at the right edge");
    }

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        let scale = |low: f64, high: f64, is_log| {
            Scale::new(&Axis { label: "", is_log }, [low, high].into_iter(), 0.0, 100.0).ticks()
        };
        assert_eq!(scale(2.0, 8.0, false), [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(scale(0.001, 0.1, true), [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1]);
        assert_eq!(scale(1e-8, 1e-1, true).len(), 8);
        assert_eq!([number(0.002), number(10.0), number(1e-8), number(0.0)], ["0.002", "10", "1e-8", "0"]);
    }

    #[test]
    fn a_report_is_one_file_without_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.html");
        let mut report = Report::new(&path, "T <1>").unwrap();
        report.table("c", &["a", "b"], &[vec!["x".into(), "near".into()]]);
        report.text("p", "same other", 5);
        report.finish(&serde_json::json!({"x": "</script>"})).unwrap();
        let html = std::fs::read_to_string(&path).unwrap();
        assert!(
            html.contains("T &lt;1&gt;") && html.contains("<td class=\"near\">") && html.contains("<mark>other</mark>")
        );
        assert_eq!(html.matches("</script>").count(), 1);
        assert!(!html.contains("http") && !html.contains("src="));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(Report::new(&dir.path().join("absent/r.html"), "").is_err());
    }
}
