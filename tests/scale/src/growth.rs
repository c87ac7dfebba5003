//! The exponent with which a measure grows: the slope of a line through its logarithms.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::{Value, json};

const MEASURES: [&str; 10] = [
    "state_bytes",
    "commands_per_s",
    "snapshot_bytes",
    "encode_ms",
    "read_ms",
    "recover_ms",
    "idle_plan_ms",
    "drain_plan_ms",
    "failover_plan_ms",
    "failover_apply_ms",
];

/// For each measure its exponents over VMs at the same nodes, and over nodes at the same VMs.
pub fn exponents(cells: &[Value]) -> Value {
    let over = |varied: &str, fixed: &str, measure: &str| {
        let points: Vec<(f64, f64)> = most_alike(cells, fixed)
            .into_iter()
            .filter_map(|cell| Some((cell[varied].as_f64()?, cell[measure].as_f64()?)))
            .collect();
        slope(&points)
    };
    let both = |measure: &str| json!({ "vms": over("vms", "nodes", measure), "nodes": over("nodes", "vms", measure) });
    MEASURES
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

/// The cells, the exponents and the packing for people.
pub fn table(result: &Value) -> String {
    let mut text = format!("{:>6} {:>7}", "nodes", "VMs");
    for measure in MEASURES {
        let _ = write!(text, " {measure:>17}");
    }
    text.push('\n');
    for cell in result["cells"].as_array().into_iter().flatten() {
        let _ = write!(text, "{:>6} {:>7}", cell["nodes"], cell["vms"]);
        for measure in MEASURES {
            let value = cell[measure].as_f64().unwrap_or(0.0);
            let digits = if measure.ends_with("_ms") { 1 } else { 0 };
            let _ = write!(text, " {value:>17.digits$}");
        }
        text.push('\n');
    }
    for over in ["vms", "nodes"] {
        let _ = write!(text, "{:>14}", format!("over {over} ^"));
        for measure in MEASURES {
            let _ = write!(text, " {:>17}", result["growth"][measure][over].to_string());
        }
        text.push('\n');
    }
    let packing = &result["packing"];
    let share = |key: &str| packing[key].as_f64().unwrap_or(0.0) * 100.0;
    let _ = writeln!(
        text,
        "packing of {} random clusters of {} nodes: at least {:.1} % of the bound in a round, {:.1} % one by one",
        packing["clusters"],
        packing["nodes"],
        share("round_share_min"),
        share("one_by_one_share_min")
    );
    text
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
        let growth = exponents(&cells);
        assert_eq!(growth["encode_ms"]["vms"], 2.0);
        assert_eq!(growth["encode_ms"]["nodes"], Value::Null);
    }
}
