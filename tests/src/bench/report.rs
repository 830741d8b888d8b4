//! Owns: rounds, medians and ratios, the table and the JSON list.
//! Promises: a ratio is the median of the ratios of rounds that ran side by side, never of medians.
//! Must not know: how a figure was measured.

use std::fmt::Write;

/// The figures of one case, a round each, with those of the raw file in the same rounds.
#[derive(Clone, Debug)]
pub struct Case {
    /// TRANSPORT/WORKLOAD.
    pub name: String,
    /// Unit of the values.
    pub unit: &'static str,
    /// Values, a round each.
    pub values: Vec<f64>,
    /// Values of the raw file in the same rounds; empty when there is nothing to compare with.
    pub raw: Vec<f64>,
    /// Values of tgt in the same rounds; empty when there is nothing to compare with.
    pub tgt: Vec<f64>,
    /// Values of libiscsi in the same rounds; empty when there is nothing to compare with.
    pub libiscsi: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

impl Case {
    /// Median of the values.
    pub fn value(&self) -> f64 {
        median(&self.values)
    }

    /// Median of the rounds' ratios to raw.
    pub fn ratio(&self) -> Option<f64> {
        let ratios = self.ratios(&self.raw);
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    /// Median and least of the rounds' ratios to tgt.
    pub fn ratio_to_tgt(&self) -> Option<(f64, f64)> {
        let ratios = self.ratios(&self.tgt);
        (!ratios.is_empty()).then(|| (median(&ratios), ratios.iter().copied().fold(f64::INFINITY, f64::min)))
    }

    /// Median of the rounds' ratios to libiscsi.
    pub fn ratio_to_libiscsi(&self) -> Option<f64> {
        let ratios = self.ratios(&self.libiscsi);
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    fn ratios(&self, others: &[f64]) -> Vec<f64> {
        self.values.iter().zip(others).map(|(value, other)| value / other).collect()
    }

    fn range(&self) -> (f64, f64) {
        self.values.iter().fold((f64::INFINITY, 0.0), |(low, high), value| (value.min(low), value.max(high)))
    }
}

/// The table for people.
pub fn table(cases: &[Case]) -> String {
    let mut text =
        format!("{:<34} {:>12} {:>8} {:>9} {:>12} {:>12}\n", "case", "median", "unit", "x peer", "min", "max");
    for case in cases {
        let (low, high) = case.range();
        let ratio =
            case.ratio().or_else(|| case.ratio_to_tgt().map(|(median, _)| median)).or_else(|| case.ratio_to_libiscsi());
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        writeln!(text, "{:<34} {:>12.1} {:>8} {ratio:>9} {low:>12.1} {high:>12.1}", case.name, case.value(), case.unit)
            .expect("a string takes everything");
    }
    text
}

/// The list for programs.
pub fn json(cases: &[Case]) -> serde_json::Value {
    let each = cases.iter().map(|case| {
        let (min, max) = case.range();
        serde_json::json!({
            "case": case.name, "value": case.value(), "unit": case.unit, "ratio_to_raw": case.ratio(), "min": min, "max": max,
            "ratio_to_tgt": case.ratio_to_tgt().map(|(median, _)| median), "least_ratio_to_tgt": case.ratio_to_tgt().map(|(_, least)| least),
            "ratio_to_libiscsi": case.ratio_to_libiscsi(),
        })
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_compares_rounds_that_ran_side_by_side() {
        let raw = vec![100.0, 10.0, 100.0];
        let case = Case {
            name: "x/y".into(),
            unit: "IOPS",
            values: vec![50.0, 5.0, 30.0],
            tgt: raw.clone(),
            libiscsi: raw.clone(),
            raw,
        };
        assert_eq!(case.ratio(), Some(0.5));
        assert_eq!(case.ratio_to_tgt(), Some((0.5, 0.3)));
        assert_eq!(case.ratio_to_libiscsi(), Some(0.5));
        assert_eq!(case.value(), 30.0);
    }
}
