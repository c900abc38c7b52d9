/* Owns: a stand-in for the deployed guest, written from the protocol's facts: one read() for each
 * id, length and count, malloc for what a length says, failure where a read of a length is short.
 * Must not know: anything of the package it tests.
 *
 * It prints one line of JSON a launch. Options let it stall, shrink its receive window, trickle,
 * stop reading or die at a chosen byte. For benchmarks it can drain the root file system through a
 * small buffer, discard it uncopied, or store it in a file; the digest is then taken only when
 * asked for. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/vm_sockets.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#define READY 0xb7
#define NEVER UINT64_MAX
#define SCRAP (1u << 20)

enum frame { ROOTFS, PATH, ARGV, ENVP, NETWORK, OUTPUT, FINISHED = 255 };

static struct options {
    uint32_t cid;
    uint32_t port;
    const char *path;
    uint64_t window;   /* SO_VM_SOCKETS_BUFFER_SIZE, 0: the kernel's default */
    uint64_t die_at;   /* close without a word once this many bytes were read */
    uint64_t stop_at;  /* read no more, and stay */
    uint64_t stall_us; /* longest pause before a read */
    uint64_t trickle;  /* most bytes of a payload read at once, 0: all */
    uint64_t repeat;
    const char *store; /* drain the root file system into this file */
    unsigned seed;
    bool drain;   /* read the root file system through a small buffer, in place of fresh memory */
    bool discard; /* the same without copying it here: splice into /dev/null */
    bool digest;  /* with drain: compute the digest all the same */
    bool hold;    /* do not close after Finished */
    bool told;    /* read a byte of standard input before each launch */
} o = {.cid = 2, .die_at = NEVER, .stop_at = NEVER, .repeat = 1};

static struct taken {
    uint64_t received;
    uint64_t reads;
    uint64_t argv;
    uint64_t envp;
    uint64_t rootfs_bytes;
    uLong strings_crc; /* of every string with its NUL, in order */
    uLong rootfs_crc;
    uint8_t *rootfs;
    int64_t connected_ns; /* CLOCK_MONOTONIC, before the connect that succeeded */
    int64_t finished_ns;  /* and after Finished was read */
    char order[16];
} t;

/* What ended a launch early; printed as "error". */
static const char *failure;

static bool fail(const char *why) {
    failure = why;
    return false;
}

static void pause_us(uint64_t us) {
    struct timespec ts = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    nanosleep(&ts, NULL);
}

static int64_t now_ns(void) {
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

/* One read, as the guest makes it. */
static ssize_t read_once(int fd, void *buf, size_t len) {
    ssize_t got;

    if (t.received >= o.die_at) {
        failure = "died as told";
        return -1;
    }
    if (t.received >= o.stop_at)
        for (;;)
            pause();
    if (o.stall_us && rand_r(&o.seed) % 64 == 0)
        pause_us((uint64_t)rand_r(&o.seed) % o.stall_us);
    got = read(fd, buf, len);
    t.reads++;
    if (got > 0)
        t.received += (uint64_t)got;
    else
        failure = got == 0 ? "end of stream" : strerror(errno);
    return got;
}

static bool read_number(int fd, uint64_t *value) {
    ssize_t got = read_once(fd, value, sizeof(*value));

    if (got > 0 && got != (ssize_t)sizeof(*value))
        return fail("short read of a length");
    return got == (ssize_t)sizeof(*value);
}

static bool read_payload(int fd, uint8_t *buf, uint64_t len) {
    while (len > 0) {
        uint64_t want = len;
        uint64_t edge = o.die_at < o.stop_at ? o.die_at : o.stop_at;
        ssize_t got;

        if (o.trickle && want > o.trickle)
            want = o.trickle;
        if (t.received < edge && want > edge - t.received)
            want = edge - t.received;
        got = read_once(fd, buf, (size_t)want);
        if (got <= 0)
            return false;
        buf += got;
        len -= (uint64_t)got;
    }
    return true;
}

static uint8_t *read_block(int fd, uint64_t *len) {
    uint8_t *block;

    if (!read_number(fd, len))
        return NULL;
    block = malloc(*len ? *len : 1);
    if (block == NULL) {
        failure = "out of memory";
        return NULL;
    }
    if (!read_payload(fd, block, *len)) {
        free(block);
        return NULL;
    }
    return block;
}

/* Take the root file system without keeping it in memory. */
static bool drain_block(int fd, uint64_t *len) {
    static uint8_t scrap[SCRAP];
    int file = o.store ? open(o.store, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    bool ok = read_number(fd, len) && (file >= 0 || !o.store || fail("cannot store"));

    for (uint64_t left = *len; ok && left > 0;) {
        ssize_t got = read_once(fd, scrap, left < SCRAP ? (size_t)left : SCRAP);

        if (got > 0 && o.digest)
            t.rootfs_crc = crc32_z(t.rootfs_crc, scrap, (size_t)got);
        if (got > 0 && file >= 0 && write(file, scrap, (size_t)got) != got)
            got = fail("cannot store");
        ok = got > 0;
        left -= ok ? (uint64_t)got : 0;
    }
    if (file >= 0)
        close(file);
    return ok;
}

/* Let the kernel throw the root file system away: no byte is copied into this process. */
static bool discard_block(int fd, uint64_t *len) {
    int ends[2] = {-1, -1};
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    bool ok = read_number(fd, len) && null >= 0 && pipe2(ends, O_CLOEXEC) == 0 &&
              fcntl(ends[1], F_SETPIPE_SZ, SCRAP) >= 0;

    for (uint64_t left = *len; ok && left > 0;) {
        ssize_t got = splice(fd, NULL, ends[1], NULL, left < SCRAP ? (size_t)left : SCRAP, 0);

        ok = got > 0 && splice(ends[0], NULL, null, NULL, (size_t)got, 0) == got;
        left -= ok ? (uint64_t)got : 0;
        t.received += ok ? (uint64_t)got : 0;
        t.reads++;
    }
    close(ends[0]);
    close(ends[1]);
    close(null);
    return ok || fail("cannot discard");
}

static bool read_string(int fd) {
    uint64_t len;
    uint8_t *string = read_block(fd, &len);
    bool ok;

    if (string == NULL)
        return false;
    ok = len > 0 && string[len - 1] == 0;
    t.strings_crc = crc32_z(t.strings_crc, string, len);
    free(string);
    return ok || fail("string without NUL");
}

static bool read_strings(int fd, uint64_t *count) {
    if (!read_number(fd, count))
        return false;
    for (uint64_t i = 0; i < *count; i++)
        if (!read_string(fd))
            return false;
    return *count > 0 || fail("empty list");
}

static bool read_frames(int fd) {
    for (size_t n = 0; n < sizeof(t.order); n++) {
        uint8_t id;

        if (read_once(fd, &id, 1) != 1)
            return false;
        t.order[n] = (char)('0' + (id == FINISHED ? 9 : id));
        switch (id) {
        case ROOTFS:
            if (o.discard) {
                if (!discard_block(fd, &t.rootfs_bytes))
                    return false;
                break;
            }
            if (o.drain || o.store) {
                if (!drain_block(fd, &t.rootfs_bytes))
                    return false;
                break;
            }
            t.rootfs = read_block(fd, &t.rootfs_bytes);
            if (t.rootfs == NULL)
                return false;
            break;
        case PATH:
            if (!read_string(fd))
                return false;
            break;
        case ARGV:
        case ENVP:
            if (!read_strings(fd, id == ARGV ? &t.argv : &t.envp))
                return false;
            break;
        case NETWORK:
        case OUTPUT:
            break;
        case FINISHED:
            return true;
        default:
            return fail("unknown id");
        }
    }
    return fail("too many frames");
}

static int connect_once(void) {
    union {
        struct sockaddr any;
        struct sockaddr_vm vm;
        struct sockaddr_un un;
    } a;
    int fd;

    memset(&a, 0, sizeof(a));
    if (o.path) {
        a.un.sun_family = AF_UNIX;
        strncpy(a.un.sun_path, o.path, sizeof(a.un.sun_path) - 1);
    } else {
        a.vm.svm_family = AF_VSOCK;
        a.vm.svm_cid = o.cid;
        a.vm.svm_port = o.port;
    }
    fd = socket(a.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && o.window && !o.path) {
        uint64_t window = o.window;

        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_MIN_SIZE, &window, sizeof(window));
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &window, sizeof(window));
    }
    if (fd >= 0 && connect(fd, &a.any, o.path ? sizeof(a.un) : sizeof(a.vm)) < 0) {
        int error = errno;

        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static bool shake_hands(int fd) {
    uint8_t byte = READY;

    return write(fd, &byte, 1) == 1 && read(fd, &byte, 1) == 1 && byte == READY;
}

/* The real guest tries once. The tests start this one before the writer listens. */
static int connect_patiently(int64_t *connected_ns) {
    for (int attempt = 0; attempt < 30000; attempt++) {
        int fd;

        *connected_ns = now_ns();
        fd = connect_once();

        if (fd >= 0 || (errno != ECONNRESET && errno != ECONNREFUSED && errno != ENOENT))
            return fd;
        pause_us(1000);
    }
    return -1;
}

static bool launch(void) {
    bool ok;
    int64_t connected_ns;
    int fd = connect_patiently(&connected_ns);

    memset(&t, 0, sizeof(t));
    t.connected_ns = connected_ns;
    failure = NULL;
    if (fd < 0)
        return fail("nobody to launch with");
    ok = shake_hands(fd) ? read_frames(fd) : fail("no ready byte");
    t.finished_ns = now_ns();
    while (ok && o.hold)
        pause();
    close(fd);
    if (t.rootfs)
        t.rootfs_crc = crc32_z(0, t.rootfs, t.rootfs_bytes);
    free(t.rootfs);
    printf("{\"ok\": %s, \"error\": \"%s\", \"received\": %" PRIu64 ", \"reads\": %" PRIu64
           ", \"argv\": %" PRIu64 ", \"envp\": %" PRIu64 ", \"strings_crc\": %lu"
           ", \"rootfs_bytes\": %" PRIu64 ", \"rootfs_crc\": %lu, \"order\": \"%s\""
           ", \"connected_ns\": %" PRId64 ", \"finished_ns\": %" PRId64 "}\n",
           ok ? "true" : "false", failure ? failure : "", t.received, t.reads, t.argv, t.envp,
           t.strings_crc, t.rootfs_bytes, t.rootfs_crc, t.order, t.connected_ns, t.finished_ns);
    fflush(stdout);
    return ok;
}

int main(int argc, char **argv) {
    static const struct option names[] = {
        {"cid", 1, 0, 'c'},      {"port", 1, 0, 'p'},    {"unix", 1, 0, 'u'},
        {"window", 1, 0, 'w'},   {"die-at", 1, 0, 'd'},  {"stop-at", 1, 0, 's'},
        {"stall-us", 1, 0, 'S'}, {"trickle", 1, 0, 't'}, {"repeat", 1, 0, 'r'},
        {"seed", 1, 0, 'e'},     {"store", 1, 0, 'f'},   {"drain", 0, 0, 'D'},
        {"digest", 0, 0, 'C'},   {"hold", 0, 0, 'h'},    {"told", 0, 0, 'T'},
        {"discard", 0, 0, 'N'},  {0, 0, 0, 0},
    };
    bool all_ok = true;
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;

        switch (name) {
        case 'c':
            o.cid = (uint32_t)value;
            break;
        case 'p':
            o.port = (uint32_t)value;
            break;
        case 'u':
            o.path = optarg;
            break;
        case 'w':
            o.window = value;
            break;
        case 'd':
            o.die_at = value;
            break;
        case 's':
            o.stop_at = value;
            break;
        case 'S':
            o.stall_us = value;
            break;
        case 't':
            o.trickle = value;
            break;
        case 'r':
            o.repeat = value;
            break;
        case 'e':
            o.seed = (unsigned)value;
            break;
        case 'f':
            o.store = optarg;
            break;
        case 'D':
            o.drain = true;
            break;
        case 'N':
            o.discard = true;
            break;
        case 'C':
            o.digest = true;
            break;
        case 'h':
            o.hold = true;
            break;
        case 'T':
            o.told = true;
            break;
        default:
            return 2;
        }
    }
    for (uint64_t i = 0; i < o.repeat; i++) {
        if (o.told && getchar() == EOF)
            return 2;
        all_ok = launch() && all_ok;
    }
    return all_ok ? 0 : 1;
}
