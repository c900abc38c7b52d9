//! Owns: what a launcher's network proxy on the reference crate does: a thread each way, which reads
//! into a buffer as large as the guest's largest frame and writes all of it.
//! Must not know: anything of the package.
//!   net_reference GUEST_FD BACKEND_FD
use std::io::{ErrorKind, Read, Result, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

const BACKEND_WAITS: Duration = Duration::from_millis(250);

fn pass_on(from: &mut UnixStream, to: &mut UnixStream, frame_bytes: usize) -> Result<()> {
    let mut buffer = vec![0u8; frame_bytes];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
    }
}

fn main() -> Result<()> {
    // Only read and write are used, so an AF_VSOCK socket behind the number is as good.
    let socket = |index: usize| {
        let number = std::env::args().nth(index).expect("a descriptor");
        unsafe { UnixStream::from_raw_fd(number.parse().expect("a number")) }
    };
    let (mut guest, mut backend) = (socket(1), socket(2));
    let mut header = [0; 4];
    guest.read_exact(&mut header)?;
    let frame_bytes = u32::from_be_bytes(header) as usize;
    backend.set_read_timeout(Some(BACKEND_WAITS))?;

    let (mut to_guest, mut from_backend) = (guest.try_clone()?, backend.try_clone()?);
    thread::spawn(move || pass_on(&mut from_backend, &mut to_guest, frame_bytes));
    pass_on(&mut guest, &mut backend, frame_bytes)
}
