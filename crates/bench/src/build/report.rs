//! The figures of a run, for people and for programs.

use comfy_table::{Table, presets};
use serde::{Serialize, Serializer};

use super::args::Args;
use super::layout::Image;
use super::{context, unpack};
use crate::Percentiles;

/// A ratio, or why there is none: a figure is measured or it is not there.
#[derive(Debug, Clone, PartialEq)]
pub enum Ratio {
    /// p50 over p50.
    Measured(f64),
    /// Why not.
    Skipped(String),
}

impl Serialize for Ratio {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Measured(ratio) => serializer.serialize_f64(*ratio),
            Self::Skipped(why) => serializer.serialize_str(&format!("skipped: {why}")),
        }
    }
}

impl Ratio {
    fn of(over: Option<&Samples>, under: Option<&Samples>, skipped: &str) -> Self {
        match (over, under) {
            (Some(over), Some(under)) if under.p50 > 0.0 => {
                Self::Measured((over.p50 / under.p50 * 1000.0).round() / 1000.0)
            }
            _ => Self::Skipped(skipped.to_owned()),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Measured(ratio) => format!("{ratio:.3}"),
            Self::Skipped(why) => format!("skipped: {why}"),
        }
    }
}

/// What was measured, in the order in which it was, and its percentiles.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Samples {
    pub n: usize,
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub samples: Vec<f64>,
}

impl Samples {
    fn of(values: &[f64]) -> Option<Self> {
        let Percentiles { p50, p95, p99 } = Percentiles::of(values)?;
        let samples = values.iter().map(|value| (value * 1000.0).round() / 1000.0).collect();
        Some(Self { n: values.len(), p50, p95, p99, samples })
    }
}

/// Builds, in seconds.
#[derive(Debug, Default)]
pub(super) struct Builds {
    pub cold: Vec<f64>,
    pub unchanged: Vec<f64>,
    pub last_line: Vec<f64>,
    pub context_bytes: u64,
}

/// Pulls.
#[derive(Debug)]
pub(super) struct Pulls {
    pub skopeo: String,
    pub umoci: String,
    pub measured: unpack::Measured,
}

/// Clones of one template, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct OfTemplate {
    pub create: Vec<f64>,
    pub first: Vec<f64>,
}

/// Clones of both.
#[derive(Debug, Default)]
pub(super) struct Clones {
    pub built: OfTemplate,
    pub beside: OfTemplate,
}

/// The result: one JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    /// A build of which nothing has changed ÷ a cold one.
    pub ratio_unchanged: Ratio,
    /// A build whose last line has changed ÷ a cold one.
    pub ratio_last_line: Ratio,
    /// Pull and unpack ÷ `skopeo copy` and `umoci unpack`.
    pub ratio_unpack: Ratio,
    /// A clone of the built template ÷ one of the other.
    pub ratio_clone: Ratio,
    pub accelerator: String,
    pub steps: usize,
    pub image_layers: usize,
    /// As they are pulled.
    pub image_compressed_bytes: u64,
    /// What the file system of the image uses, where it was pulled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_unpacked_bytes: Option<u64>,
    /// What packages that are copied into a build have, beside programs.
    pub context_bytes: u64,
    pub cold_s: Option<Samples>,
    pub unchanged_s: Option<Samples>,
    pub last_line_s: Option<Samples>,
    pub unpack_s: Option<Samples>,
    pub skopeo_umoci_s: Option<Samples>,
    pub skopeo_copy_s: Option<Samples>,
    pub umoci_unpack_s: Option<Samples>,
    /// What the two say of their versions.
    pub programs: Vec<String>,
    /// What the built template is compared with.
    pub compared_with: String,
    pub clone_built_ms: Option<Samples>,
    pub clone_compared_ms: Option<Samples>,
    pub first_command_built_ms: Option<Samples>,
    pub first_command_compared_ms: Option<Samples>,
}

impl Report {
    /// Of what was measured.
    pub(super) fn new(
        accelerator: String,
        image: &Image,
        args: &Args,
        (pulls, builds, clones): (Result<Pulls, String>, Builds, Option<Clones>),
    ) -> Self {
        let (pulls, no_pulls) = match pulls {
            Ok(pulls) => (Some(pulls), String::new()),
            Err(why) => (None, why),
        };
        let of = |values: Option<&Vec<f64>>| values.and_then(|values| Samples::of(values));
        let measured = pulls.as_ref().map(|pulls| &pulls.measured);
        let theirs = measured.map(unpack::Measured::theirs);
        let (unpack_s, skopeo_umoci_s) = (of(measured.map(|all| &all.ours)), of(theirs.as_ref()));
        let built = clones.as_ref().map(|clones| &clones.built);
        let beside = clones.as_ref().map(|clones| &clones.beside);
        let clone_built_ms = of(built.map(|all| &all.create));
        let clone_compared_ms = of(beside.map(|all| &all.create));
        let [cold_s, unchanged_s, last_line_s] =
            [&builds.cold, &builds.unchanged, &builds.last_line].map(|values| Samples::of(values));
        Self {
            ratio_unchanged: Ratio::of(unchanged_s.as_ref(), cold_s.as_ref(), "--builds 0"),
            ratio_last_line: Ratio::of(last_line_s.as_ref(), cold_s.as_ref(), "--builds 0"),
            ratio_unpack: Ratio::of(unpack_s.as_ref(), skopeo_umoci_s.as_ref(), &no_pulls),
            ratio_clone: Ratio::of(clone_built_ms.as_ref(), clone_compared_ms.as_ref(), "-n 0"),
            accelerator,
            steps: context::STEPS,
            image_layers: image.layers(),
            image_compressed_bytes: image.compressed_bytes(),
            image_unpacked_bytes: measured.map(|all| all.unpacked_bytes),
            context_bytes: builds.context_bytes,
            cold_s,
            unchanged_s,
            last_line_s,
            unpack_s,
            skopeo_umoci_s,
            skopeo_copy_s: of(measured.map(|all| &all.copy)),
            umoci_unpack_s: of(measured.map(|all| &all.unpack)),
            programs: pulls.into_iter().flat_map(|pulls| [pulls.skopeo, pulls.umoci]).collect(),
            compared_with: args.template.clone(),
            clone_built_ms,
            clone_compared_ms,
            first_command_built_ms: of(built.map(|all| &all.first)),
            first_command_compared_ms: of(beside.map(|all| &all.first)),
        }
    }

    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["", "N", "P50", "P95", "P99"]);
        let beside = &self.compared_with;
        for (name, unit, samples) in [
            ("cold build".to_owned(), "s", &self.cold_s),
            ("nothing changed".to_owned(), "s", &self.unchanged_s),
            ("last line changed".to_owned(), "s", &self.last_line_s),
            ("pull and unpack".to_owned(), "s", &self.unpack_s),
            ("skopeo copy + umoci unpack".to_owned(), "s", &self.skopeo_umoci_s),
            ("clone of what was built".to_owned(), "ms", &self.clone_built_ms),
            (format!("clone of {beside}"), "ms", &self.clone_compared_ms),
            ("built, first command".to_owned(), "ms", &self.first_command_built_ms),
            (format!("{beside}, first command"), "ms", &self.first_command_compared_ms),
        ] {
            if let Some(samples) = samples {
                let figures = [samples.p50, samples.p95, samples.p99].map(|value| format!("{value:.2}"));
                let begin = [format!("{name}, {unit}"), samples.n.to_string()];
                table.add_row(begin.into_iter().chain(figures));
            }
        }
        for (name, ratio) in [
            ("nothing changed ÷ cold", &self.ratio_unchanged),
            ("last line changed ÷ cold", &self.ratio_last_line),
            ("pull and unpack ÷ skopeo and umoci", &self.ratio_unpack),
            ("clone of what was built ÷ the other", &self.ratio_clone),
        ] {
            table.add_row([name.to_owned(), String::new(), ratio.shown()]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_measured_or_says_why_it_is_not() {
        let (one, two) = (Samples::of(&[1.0, 3.0, 2.0]).unwrap(), Samples::of(&[4.0]).unwrap());
        assert_eq!((one.n, one.p50, &one.samples[..]), (3, 2.0, &[1.0, 3.0, 2.0][..]));
        let json = |ratio: &Ratio| serde_json::to_string(ratio).unwrap();
        let ratio = Ratio::of(Some(&one), Some(&two), "x");
        assert_eq!((json(&ratio), ratio.shown()), ("0.5".to_owned(), "0.500".to_owned()));
        let zero = Samples::of(&[0.0]).unwrap();
        for ratio in [Ratio::of(None, Some(&two), "no umoci"), Ratio::of(Some(&one), Some(&zero), "no umoci")]
        {
            assert_eq!(json(&ratio), "\"skipped: no umoci\"");
            assert_eq!(ratio.shown(), "skipped: no umoci");
        }
        assert!(Samples::of(&[]).is_none());
    }
}
