//! Owns: what a launcher on the reference crate does with a file: the whole archive in memory first.
//! Must not know: anything of the package.
//!   reference ADDRESS EXEC_PATH ARCHIVE ARGC ARGV... ENVP...
mod wire;

fn main() -> std::io::Result<()> {
    wire::run(|path| std::fs::read(path))
}
