/* Owns: process 1 of the emulated enclave: the guest's side of a launch, written from the
 * protocol's description and as strict as the deployed guest where strictness decides. Must not
 * know, nor share a line with, the package it judges.
 *
 * What it is told comes from the kernel's command line, below. What it does it says on the console,
 * a line for each step that begins with "GUEST ": the tests wait for these lines, and read the
 * registers of the security module from them.
 *
 *   guest.flavour=deployed | rust-init | 1.17     which published guest it behaves as
 *   guest.stall=STEP                              stays at this step for ever, with everything
 * open: boot, connected, header, payload, finished guest.judge takes any number of launches, each
 * in namespaces of its own, one for each connection to port 9000; answers on it how the launch
 * went. Measures nothing. guest.host=CID guest.window=BYTES             another host than CID 2; a
 * smaller receive window
 */
#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

enum { READY = 0xb7, JUDGE_PORT = 9000 };
enum { ARGUMENTS = 1, NETWORK, OUTPUT, RETURN_CODE, SIGNALS };
enum { F_ROOTFS, F_PATH, F_ARGV, F_ENVP, F_NETWORK, F_OUTPUT, F_FINISHED = 255 };

static struct {
    enum { DEPLOYED, RUST_INIT, V1_17 } flavour;
    char stall[32];
    bool judge;
    unsigned host;
    uint64_t window;
} told = {.host = VMADDR_CID_HOST};

static unsigned cid;
static int verdict = -1; /* of a judge's launch: where it is told how that went */

/* --- how it ends --- */

static _Noreturn void power_off(void) {
    for (;;) {
        reboot(RB_AUTOBOOT); /* the machine is started with -no-reboot */
        pause();
    }
}

static _Noreturn void end_with(const char *kind, const char *format, va_list args) {
    char text[512];
    int error = errno;
    vsnprintf(text, sizeof text, format, args);
    printf("GUEST %s: %s (%s)\n", kind, text, strerror(error));
    fflush(stdout);
    if (verdict >= 0) {
        dprintf(verdict, "%s: %s\n", kind, text);
        _exit(1);
    }
    if (!strcmp(kind, "hangs"))
        for (;;)
            pause();
    power_off();
}

_Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with("stops", format, args);
}

/* Where the deployed guest would wait, or spin, for ever. */
_Noreturn static void hang(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with("hangs", format, args);
}

void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("GUEST ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
}

static void step(const char *name) {
    say("%s", name);
    if (!strcmp(told.stall, name)) {
        say("stalls");
        for (;;)
            pause();
    }
}

double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

/* --- sockets --- */

/* One connect, no second try. -1 where nobody listens. */
int call_host(unsigned offset) {
    struct sockaddr_vm to = {
        .svm_family = AF_VSOCK, .svm_cid = told.host, .svm_port = cid + offset};
    struct timeval patience = {.tv_sec = 5};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        die("socket");
    if (told.window) {
        uint64_t least = 128;
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_MIN_SIZE, &least, sizeof least);
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &told.window, sizeof told.window);
    }
    if (told.host != VMADDR_CID_HOST)
        to.svm_flags = VMADDR_FLAG_TO_HOST; /* a sibling, reached through the host */
    if (offset != ARGUMENTS &&
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience) < 0)
        die("connect timeout");
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0) {
        say("nobody at CID+%u: %s", offset, strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

static uint64_t number(int fd) {
    uint64_t n;
    ssize_t got = read(fd, &n, sizeof n); /* one read: a length in pieces ends the launch */
    if (got != (ssize_t)sizeof n)
        die("a length came as %zd bytes", got);
    return n;
}

/* A length and that many bytes; a NUL more than that at the end. */
static char *bytes(int fd, uint64_t *size, bool big) {
    uint64_t n = number(fd), told_at = 1 << 20;
    if (big)
        say("length %llu", (unsigned long long)n);
    char *at = malloc(n + 1), *all = at;
    if (!at)
        die("no memory for %llu bytes", (unsigned long long)n);
    for (uint64_t left = n; left;) {
        ssize_t got = read(fd, at, left);
        if (got <= 0)
            die("the host ended %llu bytes early", (unsigned long long)left);
        at += got;
        left -= (uint64_t)got;
        if (big && n - left >= told_at) {
            told_at = UINT64_MAX;
            step("payload");
        }
    }
    *at = 0;
    if (size)
        *size = n;
    return all;
}

static bool is_utf8(const char *text) {
    const unsigned char *s = (const unsigned char *)text;
    while (*s) {
        int more = *s < 0x80                 ? 0
                   : *s >= 0xc2 && *s < 0xe0 ? 1
                   : *s >= 0xe0 && *s < 0xf0 ? 2
                   : *s >= 0xf0 && *s < 0xf5 ? 3
                                             : -1;
        if (more < 0)
            return false;
        unsigned char first = *s++;
        for (int i = 0; i < more; i++, s++) {
            if ((*s & 0xc0) != 0x80)
                return false;
            if (!i && ((first == 0xe0 && *s < 0xa0) || (first == 0xed && *s > 0x9f) ||
                       (first == 0xf0 && *s < 0x90) || (first == 0xf4 && *s > 0x8f)))
                return false;
        }
    }
    return true;
}

static char *string(int fd) {
    char *text = bytes(fd, NULL, false);
    if (told.flavour == RUST_INIT && !is_utf8(text))
        die("a string is not UTF-8");
    return text;
}

static char **strings(int fd, bool first) {
    if (first)
        step("header"); /* the id is read, the count is not */
    uint64_t n = number(fd);
    char **all = malloc((n + 1) * sizeof *all);
    if (!all)
        die("no memory for %llu strings", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++)
        all[i] = string(fd);
    all[n] = NULL;
    return all;
}

/* --- the launch --- */

struct launch {
    char *archive, *path, **argv, **envp;
    uint64_t size;
    bool network, output;
};

static void take_launch(struct launch *l) {
    step("boot");
    int fd = call_host(ARGUMENTS);
    if (fd < 0)
        die("connect for the arguments");
    step("connected");
    uint8_t byte = READY, id = 100;
    if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
        die("handshake");
    if (byte != READY)
        die("the ready byte is 0x%02x", byte);
    step("handshake");
    l->output = told.flavour == V1_17; /* there, frame 5 is DEBUG and turns it off */
    for (;;) {
        ssize_t got = read(fd, &id, 1);
        if (got < 0)
            die("reading an id");
        if (got == 0 && told.flavour == RUST_INIT)
            die("end of stream in place of an id");
        /* The deployed guest does not look whether anything was read: it takes the last id once
         * more. */
        if (got == 0 && id != F_ROOTFS && id != F_PATH && id != F_ARGV && id != F_ENVP)
            hang("end of stream in place of an id");
        switch (id) {
        case F_ROOTFS:
            l->archive = bytes(fd, &l->size, true);
            break;
        case F_PATH:
            l->path = string(fd);
            break;
        case F_ARGV:
            l->argv = strings(fd, true);
            break;
        case F_ENVP:
            l->envp = strings(fd, false);
            break;
        case F_NETWORK:
            l->network = true;
            break;
        case F_OUTPUT:
            l->output = told.flavour != V1_17;
            break;
        case F_FINISHED:
            close(fd);
            return;
        default:
            if (told.flavour == RUST_INIT)
                die("unknown id %u", id);
        }
    }
}

/* --- the archive: libarchive itself, over memory, with no options set, in the guest's own root ---
 */

static void unpack(struct launch *l) {
    struct archive *in = archive_read_new(), *out = archive_write_disk_new();
    struct archive_entry *entry;
    double began = now(), extending = 0;
    uint64_t measured = 0;
    int r;
    if (!in || !out || archive_read_support_format_tar(in) != ARCHIVE_OK)
        die("libarchive");
    if (archive_read_open_memory(in, l->archive, l->size) != ARCHIVE_OK)
        die("open: %s", archive_error_string(in));
    while ((r = archive_read_next_header(in, &entry)) != ARCHIVE_EOF) {
        const void *data;
        size_t size;
        int64_t offset;
        if (r != ARCHIVE_OK)
            die("header: %s", archive_error_string(in));
        const char *name = archive_entry_pathname(entry);
        if (!name)
            die("a name that cannot be read"); /* the deployed guest is killed here: strstr(NULL) */
        bool counts = !strstr(name, "rootfs/etc/hostname") && !strstr(name, "rootfs/etc/hosts");
        unsigned kind = archive_entry_filetype(entry);
        if (told.flavour == RUST_INIT &&
            (kind == AE_IFIFO || kind == AE_IFCHR || kind == AE_IFBLK)) {
            archive_entry_set_filetype(entry, AE_IFREG);
            archive_entry_set_size(entry, 0);
        }
        if (archive_write_header(out, entry) != ARCHIVE_OK)
            die("writing %s: %s", name, archive_error_string(out));
        while ((r = archive_read_data_block(in, &data, &size, &offset)) != ARCHIVE_EOF) {
            if (r != ARCHIVE_OK)
                die("data of %s: %s", name, archive_error_string(in));
            if (counts) {
                double before = now();
                nsm_extend_pieces(16, data, size);
                extending += now() - before;
                measured += size;
            }
            if (archive_write_data_block(out, data, size, offset) != ARCHIVE_OK)
                die("writing data of %s: %s", name, archive_error_string(out));
        }
        if (archive_write_finish_entry(out) != ARCHIVE_OK)
            die("finishing %s: %s", name, archive_error_string(out));
    }
    archive_read_free(in);
    archive_write_free(out);
    say("unpacked bytes=%llu measured=%llu seconds=%.3f extending=%.3f",
        (unsigned long long)l->size, (unsigned long long)measured, now() - began, extending);
}

static void must(int r, const char *what) {
    if (r < 0)
        die("%s", what);
}

static void enter_rootfs(void) {
    static const char *const made[] = {"/dev", "/proc", "/run", "/sys", "/tmp"};
    must(mount("/rootfs", "/rootfs", NULL, MS_BIND, NULL), "bind mount of /rootfs");
    must(chdir("/rootfs"), "chdir /rootfs");
    must(mount(".", "/", NULL, MS_MOVE, NULL), "move of /rootfs");
    must(chroot("."), "chroot");
    must(chdir("/"), "chdir /");
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        if (mkdir(made[i], 0755) < 0)
            die("mkdir %s", made[i]);
    must(mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL), "mount /dev");
    /* devtmpfs is one for all: where launches come one after the other, it has these already. */
    if (mkdir("/dev/shm", 0755) < 0 && errno != EEXIST)
        die("mkdir /dev/shm");
    if (mkdir("/dev/pts", 0755) < 0 && errno != EEXIST)
        die("mkdir /dev/pts");
    must(mount("shm", "/dev/shm", "tmpfs", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL),
         "mount /dev/shm");
    must(mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, NULL), "mount /dev/pts");
    must(mount("proc", "/proc", "proc", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL), "mount /proc");
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
                                           {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},
                                           {"/proc/self/fd/2", "/dev/stderr"}};
    for (size_t i = 0; i < 4; i++)
        if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
            die("symlink %s", links[i][1]);
    must(mount("run", "/run", "tmpfs", MS_NODEV | MS_NOSUID | MS_NOEXEC, "mode=0755"),
         "mount /run");
    must(mount("tmp", "/tmp", "tmpfs", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL), "mount /tmp");
    must(mount("sysfs", "/sys", "sysfs", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL), "mount /sys");
    /* The deployed guest mounts version 1 cgroups below it; Debian's kernels have few of them. */
    must(mount("cgroup_root", "/sys/fs/cgroup", "tmpfs", MS_NODEV | MS_NOSUID | MS_NOEXEC,
               "mode=0755"),
         "mount /sys/fs/cgroup");
}

static _Noreturn void run_program(struct launch *l) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    putenv(l->envp[0]); /* only so does execvpe know PATH */
    execvpe(l->argv[0], l->argv, l->envp);
    int error = errno;
    fprintf(stderr, "exec application: %s\n", strerror(error));
    fflush(stderr);
    _exit(-error & 0xff); /* as the deployed guest's main returns it: ENOENT is 254 */
}

/* Runs the program; what is to be reported of its end. */
static int run_to_end(struct launch *l, int signals) {
    sigset_t chld;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, NULL);
    int ends = signalfd(-1, &chld, SFD_CLOEXEC);
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0)
        run_program(l);
    say("running");
    int status = 0;
    bool terminated = false;
    for (;;) {
        struct pollfd watched[] = {{.fd = ends, .events = POLLIN},
                                   {.fd = terminated ? -1 : signals, .events = POLLIN}};
        if (poll(watched, 2, -1) < 0)
            continue;
        if (watched[0].revents) {
            struct signalfd_siginfo info;
            if (read(ends, &info, sizeof info) < 0)
                continue;
            pid_t dead;
            while ((dead = waitpid(-1, &status, WNOHANG)) > 0)
                if (dead == child) {
                    say("exited status=%d", status);
                    close(ends);
                    if (told.flavour == RUST_INIT)
                        return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
                    return terminated ? 0 : status;
                }
        }
        if (watched[1].revents) {
            int signal_number = 0;
            /* End of file counts as SIGTERM; of the rest, the kernel gives process 1 only what it
             * has a handler for. */
            if (read(signals, &signal_number, sizeof signal_number) != sizeof signal_number)
                signal_number = SIGTERM;
            say("signal %d", signal_number);
            if (signal_number != SIGTERM)
                continue;
            kill(child, SIGTERM);
            terminated = true;
            if (told.flavour != RUST_INIT) {
                close(ends);
                return 0; /* the deployed guest's waitpid is interrupted: it waits no longer */
            }
        }
    }
}

static void live(void) {
    struct launch l = {0};
    take_launch(&l);
    step("finished");
    if (!l.path || !l.archive || !l.argv || !l.argv[0] || !l.envp || !l.envp[0])
        die("killed: a frame is missing"); /* SIGSEGV there */
    nsm_extend(17, l.path, strlen(l.path));
    for (char **s = l.argv; *s; s++)
        nsm_extend(17, *s, strlen(*s));
    for (char **s = l.envp; *s; s++)
        nsm_extend(17, *s, strlen(*s));
    unpack(&l);
    /* The deployed guest asks for 17, which locks the registers below it: 16, but not 17. */
    nsm_lock(17);
    for (unsigned pcr = 0; pcr < 18; pcr++)
        if (pcr < 5 || pcr == 8 || pcr > 15)
            nsm_show(pcr);
    free(l.archive);
    enter_rootfs();
    step("entered");

    int console[2] = {dup(1), dup(2)}, output = -1, network = -1, signals;
    /* Line by line for the tests, whoever has standard output. */
    FILE *log = fdopen(console[0], "w");
    if (l.output && (output = call_host(OUTPUT)) >= 0)
        say("connected output");
    if (l.network) {
        network = network_start(NETWORK, told.flavour == V1_17);
        if (network < 0)
            hang("the network's service is not there");
        say("connected network");
    }
    if ((signals = call_host(SIGNALS)) < 0)
        hang("the signals' service is not there");
    say("connected signals");
    FILE *ours = stdout;
    stdout = log;
    setvbuf(stdout, NULL, _IOLBF, 0);
    fcntl(console[0], F_SETFD, FD_CLOEXEC);
    fcntl(console[1], F_SETFD, FD_CLOEXEC);
    fcntl(signals, F_SETFD, FD_CLOEXEC);
    if (output >= 0) {
        fcntl(output, F_SETFD, FD_CLOEXEC);
        dup2(output, 1);
        dup2(output, 2);
    }
    int report = run_to_end(&l, signals);
    close(signals);
    if (l.network)
        network_stop(network);
    if (output >= 0) {
        dup2(console[0], 1);
        dup2(console[1], 2);
        close(output);
    }
    stdout = ours;
    int back = call_host(RETURN_CODE), answer;
    if (back < 0)
        die("connect for the return code");
    if (write(back, &report, sizeof report) != sizeof report)
        die("writing the return code");
    if (read(back, &answer, sizeof answer) != sizeof answer)
        die("the return code was not answered");
    close(back);
    say("reported %d", report);
    if (verdict >= 0)
        dprintf(verdict, "ran: reported %d\n", report);
}

/* --- launch after launch, for the tests that try many archives --- */

static _Noreturn void judge(void) {
    struct sockaddr_vm at = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = JUDGE_PORT};
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 8) < 0)
        die("judge's port");
    say("judges");
    mkdir("/judge", 0755);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            die("accept");
        pid_t outer = fork();
        if (outer == 0) {
            verdict = fd;
            must(unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC), "namespaces");
            pid_t life = fork();
            if (life == 0) {
                must(mount("judge", "/judge", "tmpfs", 0, "mode=0755"), "mount /judge");
                must(chdir("/judge"), "chdir");
                must(mount(".", "/", NULL, MS_MOVE, NULL), "move");
                must(chroot("."), "chroot");
                must(chdir("/"), "chdir /");
                /* What the deployed guest's root has in it when the archive comes. */
                mkdir("/dev", 0755), mkdir("/proc", 0755);
                live();
                _exit(0);
            }
            int status = 0;
            waitpid(life, &status, 0);
            if (WIFSIGNALED(status))
                dprintf(fd, "killed: signal %d\n", WTERMSIG(status));
            _exit(0);
        }
        close(fd);
        waitpid(outer, NULL, 0);
    }
}

/* --- boot --- */

static void load_modules(void) {
    FILE *list = fopen("/modules/order", "re");
    char line[128], path[160];
    while (list && fgets(line, sizeof line, list)) {
        line[strcspn(line, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", line);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            printf("GUEST module %s: %s\n", line, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (list)
        fclose(list);
}

static void read_command_line(void) {
    static char line[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (got < 0)
        die("/proc/cmdline");
    close(fd);
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        if (!strcmp(word, "guest.flavour=rust-init"))
            told.flavour = RUST_INIT;
        else if (!strcmp(word, "guest.flavour=1.17"))
            told.flavour = V1_17;
        else if (!strncmp(word, "guest.stall=", 12))
            snprintf(told.stall, sizeof told.stall, "%s", word + 12);
        else if (!strncmp(word, "guest.host=", 11))
            told.host = (unsigned)strtoul(word + 11, NULL, 10);
        else if (!strncmp(word, "guest.window=", 13))
            told.window = strtoul(word + 13, NULL, 10);
        else if (!strcmp(word, "guest.judge"))
            told.judge = true;
    }
}

/* Devices and the CID come a moment after their modules. */
static int await_device(const char *path) {
    for (int i = 0; i < 1000; i++) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0)
            return fd;
        usleep(5000);
    }
    return -1;
}

int main(void) {
    umask(022);
    mkdir("/proc", 0755), mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    if (console > 2)
        close(console);
    setvbuf(stdout, NULL, _IOLBF, 0);
    read_command_line();
    load_modules();
    int vsock = await_device("/dev/vsock");
    for (int i = 0; i < 1000; i++, usleep(5000))
        if (!ioctl(vsock, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) && cid > 2 && cid != VMADDR_CID_ANY)
            break;
    close(vsock);
    bool measures = access("/modules/nsm.ko", F_OK) == 0 && !told.judge && nsm_open(await_device);
    say("up cid=%u nsm=%s %s", cid, measures ? "yes" : "no", archive_version_string());
    if (told.judge)
        judge();
    live();
    power_off();
}
