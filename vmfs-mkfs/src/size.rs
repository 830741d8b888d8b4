//! Owns: sizes as people type and read them.
//! Promises: suffixes are powers of 1024; what does not fit 64 bits is refused.
//! Must not know: what is measured.

/// Parses `512`, `64K`, `1M`, `40G`, `2T`, also with `B` or `iB` behind the letter, in either case.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("{text:?} is no size; write a number with K, M, G, T or P behind it (powers of 1024), as in 40G");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let shift = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// `1536` as "1.5 KiB": at most one decimal, exact sizes without one.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let step = (0..UNITS.len()).rev().find(|n| bytes >= 1 << (10 * n)).unwrap_or(0);
    let unit = 1u64 << (10 * step);
    match bytes % unit {
        0 => format!("{} {}", bytes / unit, UNITS[step]),
        _ => format!("{:.1} {}", bytes as f64 / unit as f64, UNITS[step]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("64k", 65536), ("1MiB", 1 << 20), ("40G", 40 << 30), ("62t", 62 << 40)]
        {
            assert_eq!(parse(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "1 G", "1X", "20000000T", "99999999999999999999"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!((show(0), show(1536), show(1 << 30)), ("0 bytes".into(), "1.5 KiB".into(), "1 GiB".into()));
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text in ".{0,12}") {
            let _ = parse(&text);
        }

        #[test]
        fn whole_units_are_read_back(number in 1u64..1024, letter in 0usize..6) {
            let shown = show(number << (10 * letter)).replace(" bytes", "").replace(' ', "");
            prop_assert_eq!(parse(&shown), Ok(number << (10 * letter)));
        }
    }
}
