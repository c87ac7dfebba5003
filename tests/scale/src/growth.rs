//! The exponent with which a measure grows: the slope of a line through its logarithms.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::{Value, json};

/// For each measure its exponents over VMs at the same nodes, and over nodes at the same VMs.
pub fn exponents(cells: &[Value], measures: &[&str]) -> Value {
    let over = |varied: &str, fixed: &str, measure: &str| {
        let points: Vec<(f64, f64)> = most_alike(cells, fixed)
            .into_iter()
            .filter_map(|cell| Some((cell[varied].as_f64()?, cell[measure].as_f64()?)))
            .collect();
        slope(&points)
    };
    let both = |measure: &str| json!({ "vms": over("vms", "nodes", measure), "nodes": over("nodes", "vms", measure) });
    measures
        .iter()
        .map(|measure| ((*measure).to_owned(), both(measure)))
        .collect::<BTreeMap<_, _>>()
        .into_iter()
        .collect()
}

/// The largest set of cells that have the same value of one key.
fn most_alike<'a>(cells: &'a [Value], key: &str) -> Vec<&'a Value> {
    let values: BTreeSet<u64> = cells.iter().filter_map(|cell| cell[key].as_u64()).collect();
    let alike = |value: &u64| -> Vec<&Value> {
        cells.iter().filter(|cell| cell[key].as_u64() == Some(*value)).collect()
    };
    values.iter().map(alike).max_by_key(Vec::len).unwrap_or_default()
}

/// Least squares through the logarithms; null for fewer than two points.
fn slope(points: &[(f64, f64)]) -> Value {
    let logs: Vec<(f64, f64)> = points
        .iter()
        .filter(|(x, y)| *x > 0.0 && *y > 0.0)
        .map(|(x, y)| (x.ln(), y.ln()))
        .collect();
    let n = logs.len() as f64;
    let mean = |part: &dyn Fn(&(f64, f64)) -> f64| logs.iter().map(part).sum::<f64>() / n;
    let (mx, my) = (mean(&|p| p.0), mean(&|p| p.1));
    let above: f64 = logs.iter().map(|(x, y)| (x - mx) * (y - my)).sum();
    let below: f64 = logs.iter().map(|(x, _)| (x - mx).powi(2)).sum();
    match logs.len() >= 2 && below > 0.0 {
        true => json!((above / below * 100.0).round() / 100.0),
        false => Value::Null,
    }
}

/// A line for each measure and a column for each cell, for people; the exponents come last.
pub fn table(cells: &[Value], growth: &Value, measures: &[&str]) -> String {
    let mut text = String::new();
    for name in ["nodes", "vms"].iter().chain(measures) {
        let _ = write!(text, "{name:>24}");
        for cell in cells {
            let _ = write!(text, " {:>12}", number(&cell[*name]));
        }
        for over in ["vms", "nodes"] {
            let _ = match growth[*name][over].as_f64() {
                Some(exponent) => write!(text, "  {over}^{exponent:<5}"),
                None => Ok(()),
            };
        }
        text.push('\n');
    }
    text
}

fn number(value: &Value) -> String {
    match value.as_f64() {
        None => "-".into(),
        Some(value) if value.fract() == 0.0 => format!("{value:.0}"),
        Some(value) if value < 10.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_of_a_power_is_found() {
        let cells: Vec<Value> = [10_u64, 20, 40]
            .iter()
            .map(|vms| json!({ "nodes": 5, "vms": vms, "encode_ms": (vms * vms) as f64 / 7.0 }))
            .collect();
        let growth = exponents(&cells, &["encode_ms"]);
        assert_eq!(growth["encode_ms"]["vms"], 2.0);
        assert_eq!(growth["encode_ms"]["nodes"], Value::Null);
        let table = table(&cells, &growth, &["encode_ms"]);
        assert!(
            table.lines().nth(2).unwrap().contains("57.1") && table.contains("vms^2"),
            "{table}"
        );
    }
}
