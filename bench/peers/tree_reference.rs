//! Owns: what a launcher on the reference crate does with a directory: its archive, made by the crate
//! `tar`, in memory first. Must not know: anything of the package.
//!   tree_reference ADDRESS EXEC_PATH TREE ARGC ARGV... ENVP...
//!   tree_reference pack TREE        the archive to standard output, to be counted
mod wire;

use std::io::{Result, Write};

fn packed(tree: &str) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all("rootfs", tree)?;
    builder.into_inner()
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if args[1] == "pack" {
        return std::io::stdout().write_all(&packed(&args[2])?);
    }
    wire::run(packed)
}
