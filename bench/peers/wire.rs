//! Owns: a launch as the reference crate does it: one write a field and one for the archive, which is
//! in memory whole. Must not know: where the archive came from, nor anything of the package.
use std::fs::File;
use std::io::{Read, Result, Write};
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;

const READY: u8 = 0xb7;

#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> RawFd;
    fn bind(fd: RawFd, address: *const SockaddrVm, length: u32) -> i32;
    fn listen(fd: RawFd, backlog: i32) -> i32;
    fn accept(fd: RawFd, address: *mut SockaddrVm, length: *mut u32) -> RawFd;
}

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const VMADDR_CID_ANY: u32 = u32::MAX;

fn accept_vsock(port: u32) -> Result<RawFd> {
    let address = SockaddrVm {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid: VMADDR_CID_ANY,
        zero: [0; 4],
    };
    let fd = unsafe {
        let fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if fd < 0 || bind(fd, &address, 16) < 0 || listen(fd, 1) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        accept(fd, std::ptr::null_mut(), std::ptr::null_mut())
    };
    if fd < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(fd)
    }
}

fn accept_guest(address: &str) -> Result<File> {
    let fd = match address.strip_prefix("unix:") {
        Some(path) => {
            let guest = UnixListener::bind(path)?.accept()?.0;
            std::fs::remove_file(path)?;
            guest.into_raw_fd()
        }
        None => accept_vsock(address.rsplit(':').next().unwrap().parse().expect("a port"))?,
    };
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn send_block(to: &mut File, bytes: &[u8]) -> Result<()> {
    to.write_all(&(bytes.len() as u64).to_ne_bytes())?;
    to.write_all(bytes)
}

fn send_string(to: &mut File, string: &[u8]) -> Result<()> {
    let mut bytes = string.to_vec();
    bytes.push(0);
    send_block(to, &bytes)
}

fn send_strings(to: &mut File, id: u8, strings: &[Vec<u8>]) -> Result<()> {
    to.write_all(&[id])?;
    to.write_all(&(strings.len() as u64).to_ne_bytes())?;
    strings
        .iter()
        .try_for_each(|string| send_string(to, string))
}

/// Take one guest and hand it a launch; `strings` are argv, which has `argc` of them, and envp.
fn launch(
    address: &str,
    exec_path: &[u8],
    argc: usize,
    strings: &[Vec<u8>],
    archive: &[u8],
) -> Result<()> {
    let mut guest = accept_guest(address)?;
    let mut ready = [0];
    guest.read_exact(&mut ready)?;
    guest.write_all(&[READY])?;
    guest.write_all(&[4])?;
    guest.write_all(&[5])?;
    guest.write_all(&[1])?;
    send_string(&mut guest, exec_path)?;
    send_strings(&mut guest, 2, &strings[..argc])?;
    send_strings(&mut guest, 3, &strings[argc..])?;
    guest.write_all(&[0])?;
    send_block(&mut guest, archive)?;
    guest.write_all(&[255])
}

/// The archive that a path stands for, and the program's arguments launched with it.
///   PROGRAM ADDRESS EXEC_PATH PATH ARGC ARGV... ENVP...
pub fn run(archive_of: impl Fn(&str) -> Result<Vec<u8>>) -> Result<()> {
    let args: Vec<Vec<u8>> = std::env::args_os()
        .map(|arg| arg.as_bytes().to_vec())
        .collect();
    let text = |index: usize| String::from_utf8(args[index].clone()).expect("UTF-8");
    let argc: usize = text(4).parse().expect("ARGC");
    let archive = archive_of(&text(3))?;
    launch(&text(1), &args[2], argc, &args[5..], &archive)
}
