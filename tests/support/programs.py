"""Owns: small static programs for guests, compiled once a session, and archives with them.

Must not know: the package under test.
"""

import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

SOURCES = {
    # hello [STATUS]: a line on stdout, one on stderr, exits with STATUS.
    "hello": r"""
        #include <stdio.h>
        #include <stdlib.h>
        int main(int argc, char **argv) {
            puts("hello"); fflush(stdout);
            fputs("trouble\n", stderr);
            return argc > 1 ? atoi(argv[1]) : 0;
        }""",
    # kill-me SIGNAL
    "kill-me": r"""
        #include <signal.h>
        #include <stdlib.h>
        #include <unistd.h>
        int main(int argc, char **argv) {
            (void)argc;
            kill(getpid(), atoi(argv[1]));
            for (;;) pause();
        }""",
    # wait: says "ready", stays until a signal ends it.
    "wait": r"""
        #include <unistd.h>
        int main(void) {
            if (write(1, "ready\n", 6) != 6) return 1;
            for (;;) pause();
        }""",
    # stubborn: says "ready", on SIGTERM "term", and stays.
    "stubborn": r"""
        #include <signal.h>
        #include <unistd.h>
        static void on(int n) { (void)n; if (write(1, "term\n", 5) != 5) _exit(1); }
        int main(void) {
            signal(SIGTERM, on);
            if (write(1, "ready\n", 6) != 6) return 1;
            for (;;) pause();
        }""",
    # polite: says "ready", on SIGTERM "bye" and exits with 7.
    "polite": r"""
        #include <signal.h>
        #include <unistd.h>
        static void on(int n) { (void)n; if (write(1, "bye\n", 4) != 4) _exit(1); _exit(7); }
        int main(void) {
            signal(SIGTERM, on);
            if (write(1, "ready\n", 6) != 6) return 1;
            for (;;) pause();
        }""",
    # flood COUNT: so many bytes, of the pattern (offset * 2654435761 >> 24) per 4-byte word.
    "flood": r"""
        #include <stdint.h>
        #include <stdlib.h>
        #include <unistd.h>
        static uint32_t words[1 << 16];
        int main(int argc, char **argv) {
            uint64_t left = strtoull(argc > 1 ? argv[1] : "0", NULL, 10), at = 0;
            while (left > 0) {
                size_t size = sizeof(words), sent = 0;
                if (size > left) size = (size_t)left;
                for (size_t i = 0; i < sizeof(words) / 4; i++)
                    words[i] = (uint32_t)(at / 4 + i) * 2654435761u;
                while (sent < size) {
                    ssize_t n = write(1, (char *)words + sent, size - sent);
                    if (n <= 0) return 1;
                    sent += (size_t)n;
                }
                at += size; left -= size;
            }
            return 0;
        }""",
    # transfer ADDRESS PORT COUNT: sends COUNT bytes of flood's pattern over TCP, then takes as many
    # of it; says "ok COUNT", or where the first difference is.
    "transfer": r"""
        #include <arpa/inet.h>
        #include <netinet/in.h>
        #include <stdint.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/socket.h>
        #include <unistd.h>
        #define WORDS (1 << 16)
        static uint32_t ours[WORDS], theirs[WORDS];
        static void pattern(uint64_t at) {
            for (size_t i = 0; i < WORDS; i++) ours[i] = (uint32_t)(at / 4 + i) * 2654435761u;
        }
        int main(int argc, char **argv) {
            uint64_t count = strtoull(argv[3], NULL, 10), at;
            struct sockaddr_in to = {.sin_family = AF_INET};
            int s = socket(AF_INET, SOCK_STREAM, 0);
            (void)argc;
            inet_pton(AF_INET, argv[1], &to.sin_addr);
            to.sin_port = htons((uint16_t)atoi(argv[2]));
            if (connect(s, (struct sockaddr *)&to, sizeof(to)) < 0) { perror("connect"); return 1; }
            for (at = 0; at < count;) {
                size_t size = sizeof(ours), sent = 0;
                if (size > count - at) size = (size_t)(count - at);
                pattern(at);
                while (sent < size) {
                    ssize_t n = write(s, (char *)ours + sent, size - sent);
                    if (n <= 0) { perror("write"); return 1; }
                    sent += (size_t)n;
                }
                at += size;
            }
            for (at = 0; at < count;) {
                size_t size = sizeof(ours), got = 0;
                if (size > count - at) size = (size_t)(count - at);
                pattern(at);
                while (got < size) {
                    ssize_t n = read(s, (char *)theirs + got, size - got);
                    if (n <= 0) { perror("read"); return 1; }
                    got += (size_t)n;
                }
                if (memcmp(ours, theirs, size)) {
                    printf("differs after %ju\n", (uintmax_t)at);
                    return 1;
                }
                at += size;
            }
            printf("ok %ju\n", (uintmax_t)at);
            return at != count;
        }""",
    # look: what a program sees around it, a line each.
    "look": r"""
        #include <dirent.h>
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/stat.h>
        #include <unistd.h>
        extern char **environ;
        int main(int argc, char **argv) {
            char cwd[4096], line[256];
            struct dirent *e;
            struct stat st;
            FILE *f;
            DIR *d;
            printf("pid %d\nsid %d\nuid %d\n", getpid(), getsid(0), (int)getuid());
            printf("cwd %s\n", getcwd(cwd, sizeof(cwd)) ? cwd : strerror(errno));
            for (int i = 0; i < argc; i++) printf("argv %s\n", argv[i]);
            for (char **v = environ; *v; v++) printf("env %s\n", *v);
            for (d = opendir("/"); (e = readdir(d)) != NULL;)
                if (e->d_name[0] != '.') printf("root %s\n", e->d_name);
            if ((d = opendir("/proc")) != NULL)
                while ((e = readdir(d)) != NULL)
                    if (atoi(e->d_name) > 0) printf("process %s\n", e->d_name);
            if ((d = opendir("/proc/self/fd")) != NULL)
                while ((e = readdir(d)) != NULL)
                    if (e->d_name[0] != '.' && atoi(e->d_name) != dirfd(d))
                        printf("fd %s\n", e->d_name);
            if ((f = fopen("/proc/net/dev", "r")) != NULL)
                while (fgets(line, sizeof(line), f) != NULL)
                    if (strchr(line, ':') != NULL)
                        printf("net %s\n", strtok(line, " :"));
            if ((f = fopen("/proc/self/status", "r")) != NULL)
                while (fgets(line, sizeof(line), f) != NULL)
                    if (!strncmp(line, "SigIgn", 6) || !strncmp(line, "SigBlk", 6))
                        printf("%s", line);
            printf("stdin %d\n", stat("/dev/stdin", &st) == 0);
            printf("null %d\n", stat("/dev/null", &st) == 0 && S_ISCHR(st.st_mode));
            return 0;
        }""",
    # orphans: leaves a grandchild in a session of its own that ignores SIGTERM; exits with 0.
    "orphans": r"""
        #include <signal.h>
        #include <stdio.h>
        #include <unistd.h>
        int main(void) {
            if (fork() == 0) {
                setsid();
                if (fork() == 0) {
                    signal(SIGTERM, SIG_IGN);
                    close(0); close(1); close(2);
                    for (;;) pause();
                }
                _exit(0);
            }
            puts("gone");
            return 0;
        }""",
}


class Programs:
    """Compiled programs; `programs["hello"]` is a path."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __getitem__(self, name):
        path = self.folder / name
        if not path.exists():
            command = ["gcc", "-O2", "-static", "-w", "-x", "c", "-", "-o", str(path)]
            subprocess.run(command, input=SOURCES[name].encode(), check=True)
        return path

    def tar(self, *names, extra=()):
        """Return an archive with /bin/NAME for each name, and further members.

        They are what `file`, `directory` and `link` return.
        """
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
            binaries = [file(f"rootfs/bin/{n}", self[n].read_bytes(), 0o755) for n in names]
            for member, data in [directory("rootfs"), directory("rootfs/bin"), *binaries, *extra]:
                tar.addfile(member, io.BytesIO(data))
        return buffer.getvalue()


def file(name, data=b"", mode=0o644):
    """Return the member and its data."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    return member, data


def directory(name, mode=0o755):
    """Return the member, and no data."""
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    return member, b""


def link(name, target, *, hard=False):
    """Return the member, and no data."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    member.linkname = target
    return member, b""


@pytest.fixture(scope="session")
def programs():
    """Static programs for guests."""
    with tempfile.TemporaryDirectory(prefix="nv-programs") as folder:
        os.chmod(folder, 0o755)
        yield Programs(folder)
