//! Owns: the text of login and text requests: `key=value` pairs, each ended by a null (RFC 7143, 6.1).
//! Promises: any bytes give pairs or a refusal; the work is bounded by the length.
//! Must not know: what keys mean.

/// Longest key (6.1).
const MAX_KEY: usize = 63;
/// Longest text of one negotiation sequence that is taken: 8 KiB more than enough for every key at its longest.
pub const MAX_TEXT: usize = 64 << 10;

/// Why text cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A pair has no `=`.
    #[error("a pair has no '='")]
    NoValue,
    /// A key is empty, too long, or has characters that no key has.
    #[error("a key is empty, longer than 63 bytes or has unusual characters")]
    Key,
    /// A value is no text.
    #[error("a value is not text")]
    Value,
    /// A key comes twice.
    #[error("a key comes twice")]
    Twice,
    /// The last pair has no end.
    #[error("the last pair is not ended by a null")]
    Open,
    /// More text than anybody needs.
    #[error("more than {MAX_TEXT} bytes")]
    TooLong,
}

/// The pairs of a complete text. Empty pairs (padding) are skipped.
pub fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, TextError> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    let Some((&last, _)) = text.split_last() else { return Ok(pairs) };
    if last != 0 {
        return Err(TextError::Open);
    }
    for pair in text.split(|&byte| byte == 0).filter(|pair| !pair.is_empty()) {
        let equals = pair.iter().position(|&byte| byte == b'=').ok_or(TextError::NoValue)?;
        let (key, value) = (&pair[..equals], &pair[equals + 1..]);
        let is_key = |byte: &u8| byte.is_ascii_alphanumeric() || b".-+@_#".contains(byte);
        if key.is_empty() || key.len() > MAX_KEY || !key.iter().all(is_key) {
            return Err(TextError::Key);
        }
        let key = std::str::from_utf8(key).map_err(|_| TextError::Key)?;
        let value = std::str::from_utf8(value).map_err(|_| TextError::Value)?;
        if pairs.len() >= 256 {
            return Err(TextError::TooLong);
        }
        if pairs.iter().any(|(known, _)| *known == key) {
            return Err(TextError::Twice);
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Adds a pair to a text.
pub fn push(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// A number: decimal, or hexadecimal after `0x` (6.1, numerical-value).
pub fn number(value: &str) -> Option<u64> {
    let (digits, radix) = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (value, 10),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|digit| (digit as char).is_digit(radix));
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

/// Bytes of a binary value: hexadecimal after `0x`, base64 after `0b` (6.1, binary-value). At most 1024 bytes.
pub fn binary(value: &str) -> Option<Vec<u8>> {
    const MOST: usize = 1024;
    if let Some(digits) = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        if digits.is_empty() || digits.len() > 2 * MOST {
            return None;
        }
        let nibbles: Option<Vec<u8>> = digits.chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect();
        let mut nibbles = nibbles?;
        if nibbles.len() % 2 == 1 {
            nibbles.insert(0, 0);
        }
        return Some(nibbles.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect());
    }
    let digits = value.strip_prefix("0b").or_else(|| value.strip_prefix("0B"))?;
    if digits.is_empty() || digits.len() > MOST * 4 / 3 || !digits.len().is_multiple_of(4) {
        return None;
    }
    let body = digits.trim_end_matches('=');
    if digits.len() - body.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0u32);
    for digit in body.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Some(bytes)
}

/// The hexadecimal form of bytes.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_are_read_and_padding_is_skipped() {
        assert_eq!(parse(b"A=1\0B=\0\0\0").unwrap(), [("A", "1"), ("B", "")]);
        assert_eq!(parse(b"").unwrap(), []);
        assert_eq!(parse(b"A=1"), Err(TextError::Open));
        assert_eq!(parse(b"A\0"), Err(TextError::NoValue));
        assert_eq!(parse(b"=1\0"), Err(TextError::Key));
        assert_eq!(parse(b"A=1\0A=2\0"), Err(TextError::Twice));
        assert_eq!(parse(b"A=\xFF\0"), Err(TextError::Value));
    }

    #[test]
    fn numbers_and_binary_values_are_those_of_6_1() {
        assert_eq!(
            (number("0x1F"), number("31"), number("-1"), number("0x"), number("+1")),
            (Some(31), Some(31), None, None, None)
        );
        assert_eq!(binary("0x0102"), Some(vec![1, 2]));
        assert_eq!(binary("0x102"), Some(vec![1, 2]));
        assert_eq!(binary("0bAQID"), Some(vec![1, 2, 3]));
        assert_eq!(binary("0bAQI="), Some(vec![1, 2]));
        assert_eq!((binary("12"), binary("0b==="), binary("0x")), (None, None, None));
        assert_eq!(hexadecimal(&[0, 0xAB]), "0x00ab");
    }

    proptest! {
        #[test]
        fn any_bytes_are_pairs_or_refused(text in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(pairs) = parse(&text) {
                let mut again = Vec::new();
                pairs.iter().for_each(|(key, value)| push(&mut again, key, value));
                prop_assert_eq!(parse(&again).unwrap(), pairs);
            }
        }

        #[test]
        fn binary_values_come_back(bytes in prop::collection::vec(any::<u8>(), 1..100)) {
            prop_assert_eq!(binary(&hexadecimal(&bytes)), Some(bytes));
        }
    }
}
