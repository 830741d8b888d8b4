//! Owns: the text of a `.vmdk` descriptor: parser and writer.
//! Promises: foreign text never panics and gives a typed error with its line; what is written is read back as the same value.
//! Must not know: files, volumes, where the extent's data lies.

use std::fmt;

use crate::format::body::DiskFormat;

/// Bytes of a sector in the descriptor.
pub const SECTOR_BYTES: u64 = 512;
/// Longest text that is looked at (VMware's descriptors are about 1 KiB).
pub const MAX_DESCRIPTOR_BYTES: usize = 64 << 10;
/// CID of "no parent" (VMware Virtual Disk Format 1.1, "The Header").
pub const NO_PARENT: u32 = 0xffff_ffff;

/// Why a text is no descriptor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// Not UTF-8, or longer than [`MAX_DESCRIPTOR_BYTES`].
    #[error("the file is no text of at most 64 KiB; give the small .vmdk file, not the -flat.vmdk")]
    NotText,
    /// The first line that says anything is not `# Disk DescriptorFile` or `version=`.
    #[error("the text does not begin with \"# Disk DescriptorFile\"")]
    Magic,
    /// A line that has no meaning.
    #[error("line {line}: {cause}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// A field that must be there.
    #[error("there is no {0}")]
    Missing(&'static str),
}

/// Access of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `RW`.
    ReadWrite,
    /// `RDONLY`.
    ReadOnly,
    /// `NOACCESS`.
    None,
}

/// One extent line: `RW 8388608 VMFS "disk-flat.vmdk"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Access.
    pub access: Access,
    /// Length in sectors of 512 bytes.
    pub sectors: u64,
    /// Type: `VMFS`, `FLAT`, `VMFSRDM`, `SPARSE`, `ZERO`, ... as it stands.
    pub kind: String,
    /// File with the data; none for `ZERO`.
    pub file: Option<String>,
    /// Offset in the file in sectors, where the line has one.
    pub offset: Option<u64>,
}

/// A descriptor. Header lines and disk data base keep their order; keys that are not known are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Content id: changes when the content is changed after a snapshot was taken of it.
    pub cid: u32,
    /// Content id of the parent, [`NO_PARENT`] for none.
    pub parent_cid: u32,
    /// `vmfs`, `monolithicFlat`, `vmfsRawDeviceMap`, ...
    pub create_type: String,
    /// Other header lines, `encoding` for example, key and value without quotes.
    pub header: Vec<(String, String)>,
    /// Extents in order.
    pub extents: Vec<Extent>,
    /// Disk data base: keys without `ddb.`, values without quotes.
    pub ddb: Vec<(String, String)>,
}

/// SCSI adapter that a disk was made for, `ddb.adapterType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterType {
    /// `lsilogic`: all SCSI adapters but BusLogic (PVSCSI too, as VMware writes it).
    #[default]
    LsiLogic,
    /// `buslogic`.
    BusLogic,
    /// `ide`.
    Ide,
}

impl AdapterType {
    /// As the descriptor spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            AdapterType::LsiLogic => "lsilogic",
            AdapterType::BusLogic => "buslogic",
            AdapterType::Ide => "ide",
        }
    }
}

impl Descriptor {
    /// The descriptor of a disk of `bytes` bytes whose data is in `flat_name`.
    pub fn for_disk(bytes: u64, flat_name: &str, format: DiskFormat, adapter: AdapterType, cid: u32) -> Descriptor {
        let sectors = bytes.div_ceil(SECTOR_BYTES);
        let (cylinders, heads, per_track) = geometry(sectors, adapter);
        let mut ddb = vec![
            ("adapterType".to_owned(), adapter.as_str().to_owned()),
            ("geometry.cylinders".to_owned(), cylinders.to_string()),
            ("geometry.heads".to_owned(), heads.to_string()),
            ("geometry.sectors".to_owned(), per_track.to_string()),
        ];
        if format == DiskFormat::Thin {
            ddb.push(("thinProvisioned".to_owned(), "1".to_owned()));
        }
        ddb.push(("virtualHWVersion".to_owned(), "13".to_owned()));
        Descriptor {
            cid,
            parent_cid: NO_PARENT,
            create_type: "vmfs".to_owned(),
            header: vec![("encoding".to_owned(), "UTF-8".to_owned())],
            extents: vec![Extent {
                access: Access::ReadWrite,
                sectors,
                kind: "VMFS".to_owned(),
                file: Some(flat_name.to_owned()),
                offset: None,
            }],
            ddb,
        }
    }

    /// The descriptor of a raw device mapping of `bytes` bytes in `mapping_name` (createType and extent as ESX writes them).
    pub fn for_raw_device(
        bytes: u64,
        mapping_name: &str,
        physical: bool,
        adapter: AdapterType,
        cid: u32,
    ) -> Descriptor {
        let mut descriptor = Descriptor::for_disk(bytes, mapping_name, DiskFormat::EagerZeroedThick, adapter, cid);
        let create_type = if physical { "vmfsPassthroughRawDeviceMap" } else { "vmfsRawDeviceMap" };
        descriptor.create_type = create_type.to_owned();
        descriptor.extents[0].kind = "VMFSRDM".to_owned();
        descriptor
    }

    /// Parses the bytes of a descriptor file.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, DescriptorError> {
        if bytes.len() > MAX_DESCRIPTOR_BYTES {
            return Err(DescriptorError::NotText);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| DescriptorError::NotText)?;
        let text = text.trim_end_matches('\0');
        let mut parser = Parser::default();
        for (nth, line) in text.lines().enumerate() {
            parser.line(nth + 1, line.trim())?;
        }
        parser.finish()
    }

    /// Size of the disk in bytes: all extents together, `None` when it exceeds 2^63.
    pub fn disk_bytes(&self) -> Option<u64> {
        let sectors = self.extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.sectors))?;
        sectors.checked_mul(SECTOR_BYTES).filter(|bytes| *bytes < 1 << 63)
    }

    /// A value of the disk data base.
    pub fn ddb_value(&self, key: &str) -> Option<&str> {
        self.ddb.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// Sets a value of the disk data base, or removes it.
    pub fn set_ddb(&mut self, key: &str, value: Option<&str>) {
        let place = self.ddb.iter().position(|(k, _)| k == key);
        match (place, value) {
            (Some(at), Some(value)) => self.ddb[at].1 = value.to_owned(),
            (Some(at), None) => drop(self.ddb.remove(at)),
            (None, Some(value)) => self.ddb.push((key.to_owned(), value.to_owned())),
            (None, None) => {}
        }
    }

    /// The only extent of a disk whose data is one file beside the descriptor (type `VMFS`, `FLAT`, or `VMFSRDM` for a raw device
    /// mapping): its name and sectors.
    pub fn flat_extent(&self) -> Option<(&str, u64)> {
        match self.extents.as_slice() {
            [Extent { kind, file: Some(file), sectors, offset: None | Some(0), .. }]
                if matches!(kind.as_str(), "VMFS" | "FLAT" | "VMFSRDM") && !file.contains('/') =>
            {
                Some((file, *sectors))
            }
            _ => None,
        }
    }

    /// Changes the size of a disk of one extent, geometry included.
    pub fn set_disk_bytes(&mut self, bytes: u64, adapter: AdapterType) {
        let sectors = bytes.div_ceil(SECTOR_BYTES);
        if let [extent] = self.extents.as_mut_slice() {
            extent.sectors = sectors;
        }
        let (cylinders, heads, per_track) = geometry(sectors, adapter);
        self.set_ddb("geometry.cylinders", Some(&cylinders.to_string()));
        self.set_ddb("geometry.heads", Some(&heads.to_string()));
        self.set_ddb("geometry.sectors", Some(&per_track.to_string()));
    }

    /// The adapter the disk was made for; LSI Logic where the text says something else.
    pub fn adapter(&self) -> AdapterType {
        match self.ddb_value("adapterType") {
            Some("buslogic") => AdapterType::BusLogic,
            Some("ide") => AdapterType::Ide,
            _ => AdapterType::LsiLogic,
        }
    }
}

/// Cylinders, heads and sectors as VMware computes them: SCSI disks by size as BusLogic's BIOS does, IDE 16 x 63 with at most 16383.
fn geometry(sectors: u64, adapter: AdapterType) -> (u64, u64, u64) {
    const GIB: u64 = (1 << 30) / SECTOR_BYTES;
    let (heads, per_track, most) = match adapter {
        AdapterType::Ide => (16, 63, 16_383),
        _ if sectors < GIB => (64, 32, u64::from(u32::MAX)),
        _ if sectors < 2 * GIB => (128, 32, u64::from(u32::MAX)),
        _ => (255, 63, u64::from(u32::MAX)),
    };
    ((sectors / (heads * per_track)).min(most), heads, per_track)
}

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# Disk DescriptorFile\nversion=1")?;
        for (key, value) in &self.header {
            writeln!(f, "{key}=\"{value}\"")?;
        }
        writeln!(f, "CID={:08x}\nparentCID={:08x}\ncreateType=\"{}\"", self.cid, self.parent_cid, self.create_type)?;
        writeln!(f, "\n# Extent description")?;
        for extent in &self.extents {
            let access = match extent.access {
                Access::ReadWrite => "RW",
                Access::ReadOnly => "RDONLY",
                Access::None => "NOACCESS",
            };
            write!(f, "{access} {} {}", extent.sectors, extent.kind)?;
            if let Some(file) = &extent.file {
                write!(f, " \"{file}\"")?;
            }
            if let Some(offset) = extent.offset {
                write!(f, " {offset}")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "\n# The Disk Data Base\n#DDB\n")?;
        for (key, value) in &self.ddb {
            writeln!(f, "ddb.{key} = \"{value}\"")?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Parser {
    begun: bool,
    cid: Option<u32>,
    parent_cid: Option<u32>,
    create_type: Option<String>,
    header: Vec<(String, String)>,
    extents: Vec<Extent>,
    ddb: Vec<(String, String)>,
}

impl Parser {
    fn line(&mut self, nth: usize, line: &str) -> Result<(), DescriptorError> {
        let wrong = |cause| DescriptorError::Line { line: nth, cause };
        if line.is_empty() {
            return Ok(());
        }
        if !self.begun {
            self.begun = line.eq_ignore_ascii_case("# Disk DescriptorFile") || line.starts_with("version");
            if !self.begun {
                return Err(DescriptorError::Magic);
            }
        }
        if line.starts_with('#') {
            return Ok(());
        }
        let first = line.split_whitespace().next().unwrap_or_default();
        if matches!(first, "RW" | "RDONLY" | "NOACCESS") {
            self.extents.push(extent(line).map_err(wrong)?);
            return Ok(());
        }
        let (key, value) = line.split_once('=').ok_or(wrong("neither a comment, a key with a value nor an extent"))?;
        let (key, value) = (key.trim(), unquoted(value.trim()).ok_or(wrong("a quotation mark is missing"))?);
        if key.is_empty() || key.contains('"') {
            return Err(wrong("the key is empty or quoted"));
        }
        let id = || u32::from_str_radix(value, 16).map_err(|_| wrong("a content id is up to 8 hex digits"));
        match key {
            "version" if value.parse::<u32>().is_ok_and(|v| (1..=4).contains(&v)) => {}
            "version" => return Err(wrong("the version is not 1 to 4")),
            "CID" => self.cid = Some(id()?),
            "parentCID" => self.parent_cid = Some(id()?),
            "createType" => self.create_type = Some(value.to_owned()),
            _ => match key.strip_prefix("ddb.") {
                Some(key) => self.ddb.push((key.to_owned(), value.to_owned())),
                None => self.header.push((key.to_owned(), value.to_owned())),
            },
        }
        Ok(())
    }

    fn finish(self) -> Result<Descriptor, DescriptorError> {
        if !self.begun {
            return Err(DescriptorError::Magic);
        }
        if self.extents.is_empty() {
            return Err(DescriptorError::Missing("extent line"));
        }
        Ok(Descriptor {
            cid: self.cid.ok_or(DescriptorError::Missing("CID"))?,
            parent_cid: self.parent_cid.unwrap_or(NO_PARENT),
            create_type: self.create_type.ok_or(DescriptorError::Missing("createType"))?,
            header: self.header,
            extents: self.extents,
            ddb: self.ddb,
        })
    }
}

/// The text between quotation marks, or the text itself when it has none.
fn unquoted(text: &str) -> Option<&str> {
    match text.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains('"')),
        None if text.contains('"') => None,
        None => Some(text),
    }
}

fn extent(line: &str) -> Result<Extent, &'static str> {
    let mut rest = line;
    let mut word = || {
        let trimmed = rest.trim_start();
        let (word, tail) = trimmed.split_at(trimmed.find(char::is_whitespace).unwrap_or(trimmed.len()));
        rest = tail;
        word
    };
    let access = match word() {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        _ => Access::None,
    };
    let sectors = word().parse().map_err(|_| "the number of sectors is no number")?;
    let kind = word();
    if kind.is_empty() || kind.contains('"') {
        return Err("the extent has no type");
    }
    let (file, tail) = match rest.trim().strip_prefix('"') {
        Some(quoted) => {
            let (file, tail) = quoted.split_once('"').ok_or("a quotation mark is missing")?;
            if file.is_empty() {
                return Err("the extent's file name is empty");
            }
            (Some(file.to_owned()), tail.trim())
        }
        None => (None, rest.trim()),
    };
    if file.is_none() && kind != "ZERO" {
        return Err("the extent has no file name");
    }
    let offset = match tail {
        "" => None,
        text => Some(text.split_whitespace().next().unwrap_or(text).parse().map_err(|_| "the offset is no number")?),
    };
    Ok(Extent { access, sectors, kind: kind.to_owned(), file, offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_descriptor_is_written_as_vmware_writes_it() {
        let disk = Descriptor::for_disk(4 << 30, "vm-flat.vmdk", DiskFormat::Thin, AdapterType::LsiLogic, 0xfffffffe);
        let expected = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=fffffffe\nparentCID=ffffffff\n\
            createType=\"vmfs\"\n\n# Extent description\nRW 8388608 VMFS \"vm-flat.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
            ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"522\"\nddb.geometry.heads = \"255\"\n\
            ddb.geometry.sectors = \"63\"\nddb.thinProvisioned = \"1\"\nddb.virtualHWVersion = \"13\"\n";
        assert_eq!(disk.to_string(), expected);
        assert_eq!(Descriptor::parse(expected.as_bytes()).unwrap(), disk);
        assert_eq!(disk.flat_extent(), Some(("vm-flat.vmdk", 8_388_608)));
        assert_eq!(disk.disk_bytes(), Some(4 << 30));
    }

    #[test]
    fn text_of_other_programs_is_understood() {
        let text = "# Disk DescriptorFile\r\nversion=1\r\nCID=deadbeef\r\nparentCID=ffffffff\r\n\
            createType=\"monolithicFlat\"\r\n\r\n# Extent description\r\nRW 2048 FLAT \"a b-flat.vmdk\" 0\r\nRW 8 ZERO\r\n\r\n\
            #DDB\r\nddb.adapterType = \"ide\"\r\nddb.uuid.image=\"1-2\"\r\n\0\0";
        let disk = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!((disk.cid, disk.adapter(), disk.extents.len()), (0xdead_beef, AdapterType::Ide, 2));
        assert_eq!(disk.extents[0].file.as_deref(), Some("a b-flat.vmdk"));
        assert_eq!(disk.ddb_value("uuid.image"), Some("1-2"));
        assert_eq!(disk.flat_extent(), None);
    }

    #[test]
    fn text_that_is_no_descriptor_is_refused_with_its_line() {
        let refused = |text: &str| Descriptor::parse(text.as_bytes()).unwrap_err();
        assert_eq!(refused(""), DescriptorError::Magic);
        assert_eq!(refused("KDMV"), DescriptorError::Magic);
        let head = "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"vmfs\"\n";
        assert_eq!(refused(head), DescriptorError::Missing("extent line"));
        for bad in
            ["RW x VMFS \"f\"", "RW 1 VMFS", "RW 1 VMFS \"f", "RW 1 VMFS \"\"", "CID=xyz", "version=9", "?", "a=\"b"]
        {
            let error = refused(&format!("{head}{bad}\n"));
            assert!(matches!(error, DescriptorError::Line { line: 5, .. }), "{bad}: {error:?}");
        }
        assert_eq!(Descriptor::parse(&[0xff; 9]), Err(DescriptorError::NotText));
        assert_eq!(Descriptor::parse(&[b'#'; 70_000]), Err(DescriptorError::NotText));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Descriptor::parse(&bytes);
        }

        #[test]
        fn a_damaged_descriptor_is_parsed_or_refused_and_reads_back(
            at in any::<prop::sample::Index>(), byte in 0x20..0x7fu8, insert in any::<bool>(),
        ) {
            let disk = Descriptor::for_disk(1 << 20, "d-flat.vmdk", DiskFormat::Thin, AdapterType::BusLogic, 7);
            let mut text = disk.to_string().into_bytes();
            let place = at.index(text.len());
            if insert { text.insert(place, byte) } else { text[place] = byte }
            if let Ok(parsed) = Descriptor::parse(&text) {
                prop_assert_eq!(Descriptor::parse(parsed.to_string().as_bytes()), Ok(parsed));
            }
        }
    }
}
