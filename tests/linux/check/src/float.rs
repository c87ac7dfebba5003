//! The vector registers: a computation that keeps its state in them for long, done twice.

const STEPS: u32 = 20_000;

/// The logistic map from a start that depends on the seed: chaotic, so that one wrong bit in any
/// step gives another end.
fn orbit(seed: u64) -> [f64; 4] {
    let mut state = [0.1, 0.2, 0.3, 0.4].map(|start| start + seed as f64 * 1e-3);
    for _ in 0..STEPS {
        for value in &mut state {
            *value = 3.99 * *value * (1.0 - *value);
        }
    }
    state
}

/// Two orbits from the same start end at the same place, bit for bit.
pub fn check(seed: u64) -> Result<(), String> {
    let (first, second) = (orbit(seed), orbit(std::hint::black_box(seed)));
    match first.map(f64::to_bits) == second.map(f64::to_bits) {
        true => Ok(()),
        false => Err(format!("vector registers: {first:?} and {second:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orbit_depends_on_its_start() {
        assert_eq!(check(1), Ok(()));
        assert_ne!(orbit(1).map(f64::to_bits), orbit(2).map(f64::to_bits));
    }
}
