//! Owns: when the C library's allocator gives memory back to the kernel.
//! Promises: what was needed for a moment, to look through tables or to read a directory, does not stay with the process.
//! Must not know: who allocates. The one `unsafe` of this crate: mallopt(3) is a function of the C library.
#![allow(unsafe_code)]

/// Larger pieces are mapped for themselves and go back when they are freed. The C library begins with the same number.
const MAPPED_FROM: libc::c_int = 128 << 10;
/// What is free at the end of the heap and larger goes back.
const TRIMMED_FROM: libc::c_int = 1 << 20;

/// Sets both limits for good. Left alone, the first one grows with every large piece that is freed, up to 32 MiB: from then on such pieces lie in
/// the heap, between others that stay.
pub fn give_memory_back() {
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, MAPPED_FROM), (libc::M_TRIM_THRESHOLD, TRIMMED_FROM)] {
        // SAFETY: it changes a number of the allocator, under the allocator's own lock.
        let is_set = unsafe { libc::mallopt(parameter, value) };
        if is_set == 0 {
            tracing::debug!(parameter, value, "the allocator takes no such limit");
        }
    }
}
