//! Owns: XDR (RFC 4506) as far as ONC RPC and NFSv3 need it.
//! Promises: reading foreign bytes never panics, never reads past them and never allocates by a length that they name.
//! Must not know: what the values mean.

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// They end too early.
    #[error("the message ends too early")]
    Short,
    /// A length that the protocol does not allow here.
    #[error("a length of {0} where at most {1} is allowed")]
    TooLong(u32, usize),
    /// An enumeration or boolean has a value that there is not.
    #[error("a value of {0} where there is none")]
    Value(u32),
    /// A name that is no text.
    #[error("a text that is not UTF-8")]
    Text,
}

/// Reads values off bytes, front to back.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Of these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], XdrError> {
        let (head, tail) = self.0.split_at_checked(length).ok_or(XdrError::Short)?;
        self.0 = tail;
        Ok(head)
    }

    /// `N` bytes as they are (fixed opaque data whose length is a multiple of 4).
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(XdrError::Short)?;
        self.0 = tail;
        Ok(*head)
    }

    /// Unsigned integer (4.2).
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Unsigned hyper integer (4.5).
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Boolean (4.4).
    pub fn bool(&mut self) -> Result<bool, XdrError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(XdrError::Value(other)),
        }
    }

    /// Variable-length opaque data of at most `most` bytes (4.10), with its padding.
    pub fn opaque(&mut self, most: usize) -> Result<&'a [u8], XdrError> {
        let length = self.u32()?;
        if length as usize > most {
            return Err(XdrError::TooLong(length, most));
        }
        let bytes = self.take(length as usize)?;
        self.take(padding(length as usize))?;
        Ok(bytes)
    }

    /// String of at most `most` bytes (4.11).
    pub fn text(&mut self, most: usize) -> Result<&'a str, XdrError> {
        std::str::from_utf8(self.opaque(most)?).map_err(|_| XdrError::Text)
    }
}

/// Writes values behind what a vector holds already.
pub trait Writer {
    /// Unsigned integer.
    fn put_u32(&mut self, value: u32);
    /// Unsigned hyper integer.
    fn put_u64(&mut self, value: u64);
    /// Boolean.
    fn put_bool(&mut self, value: bool);
    /// Variable-length opaque data or a string.
    fn put_opaque(&mut self, bytes: &[u8]);
}

impl Writer for Vec<u8> {
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_bool(&mut self, value: bool) {
        self.put_u32(value.into());
    }

    fn put_opaque(&mut self, bytes: &[u8]) {
        self.put_u32(bytes.len() as u32);
        self.extend_from_slice(bytes);
        self.extend_from_slice(&[0; 3][..padding(bytes.len())]);
    }
}

/// Bytes that fill a length up to a multiple of 4.
pub fn padding(length: usize) -> usize {
    length.wrapping_neg() & 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_have_the_bytes_of_the_standard() {
        let mut bytes = Vec::new();
        bytes.put_u32(0x0102_0304);
        bytes.put_bool(true);
        bytes.put_opaque(b"abcde");
        assert_eq!(bytes, [1, 2, 3, 4, 0, 0, 0, 1, 0, 0, 0, 5, b'a', b'b', b'c', b'd', b'e', 0, 0, 0]);
    }

    #[test]
    fn a_length_that_lies_is_refused_before_anything_is_taken() {
        let huge = [0xFF, 0xFF, 0xFF, 0xFC, 0, 0, 0, 0];
        assert_eq!(Reader::new(&huge).opaque(64), Err(XdrError::TooLong(0xFFFF_FFFC, 64)));
        assert_eq!(Reader::new(&huge).opaque(usize::MAX), Err(XdrError::Short));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(number: u64, flag: bool, bytes in prop::collection::vec(any::<u8>(), 0..70)) {
            let mut written = Vec::new();
            written.put_u64(number);
            written.put_opaque(&bytes);
            written.put_opaque(&bytes);
            written.put_bool(flag);
            let mut reader = Reader::new(&written);
            prop_assert_eq!(reader.u64(), Ok(number));
            prop_assert_eq!(reader.opaque(70), Ok(&bytes[..]));
            prop_assert_eq!(reader.opaque(70), Ok(&bytes[..]));
            prop_assert_eq!(reader.bool(), Ok(flag));
            prop_assert_eq!(reader.rest(), b"");
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut reader = Reader::new(&bytes);
            let _ = (reader.opaque(16).is_ok(), reader.text(16).is_ok(), reader.bool().is_ok(), reader.u64().is_ok());
        }
    }
}
