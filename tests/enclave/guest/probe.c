/* Owns: the program that runs in the emulated enclave: shows what it was given, writes, waits,
 * talks TCP, as its arguments say. Must not know how it came there. Static, and of no library but
 * the C one. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static uint32_t table[8][256];
static unsigned char block[1 << 16];

static void fail(const char *what) {
    perror(what);
    exit(99);
}

static void make_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            table[k][i] = table[0][table[k - 1][i] & 255] ^ table[k - 1][i] >> 8;
}

/* CRC-32 as zlib has it, eight bytes at a time: a gigabyte is to be read in seconds on an emulated
 * processor. */
static uint32_t crc32(uint32_t crc, const unsigned char *at, size_t n) {
    crc = ~crc;
    for (; n >= 8; n -= 8, at += 8) {
        uint64_t w;
        memcpy(&w, at, 8);
        w ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++)
            crc ^= table[7 - k][w >> 8 * k & 255];
    }
    for (; n; n--)
        crc = table[0][(crc ^ *at++) & 255] ^ crc >> 8;
    return ~crc;
}

static void write_all(int fd, const void *data, size_t n) {
    for (const char *at = data; n;) {
        ssize_t put = write(fd, at, n);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            fail("write");
        at += put;
        n -= (size_t)put;
    }
}

/* A pattern that shows where it was cut: its place, every eight bytes. */
static void fill(uint64_t from, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = (from + i) * 0x9e3779b97f4a7c15u;
        memcpy(block + i, &word, 8);
    }
}

static void flood(uint64_t size) {
    for (uint64_t at = 0; at < size; at += sizeof block) {
        fill(at, sizeof block);
        write_all(at / sizeof block % 2 ? 2 : 1, block, sizeof block);
    }
}

static void digest(const char *path) {
    uint32_t crc = 0;
    uint64_t size = 0;
    int fd = open(path, O_RDONLY);
    ssize_t got = 0;
    while (fd >= 0 && (got = read(fd, block, sizeof block)) > 0) {
        crc = crc32(crc, block, (size_t)got);
        size += (uint64_t)got;
    }
    if (fd < 0 || got < 0)
        fail(path);
    printf("%08x %llu\n", crc, (unsigned long long)size);
}

static void talk(const char *address, int port, uint64_t size, int mtu) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (mtu) {
        struct ifreq device = {.ifr_name = "tap0"};
        device.ifr_mtu = mtu;
        if (ioctl(fd, SIOCSIFMTU, &device) < 0)
            fail("SIOCSIFMTU");
    }
    inet_pton(AF_INET, address, &to.sin_addr);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        fail("connect");
    uint32_t sent = 0, got = 0;
    for (uint64_t at = 0; at < size; at += sizeof block) {
        fill(at, sizeof block);
        sent = crc32(sent, block, sizeof block);
        write_all(fd, block, sizeof block);
    }
    for (uint64_t at = 0; at < size;) {
        ssize_t n = read(fd, block, sizeof block);
        if (n <= 0)
            fail("read");
        got = crc32(got, block, (size_t)n);
        at += (uint64_t)n;
    }
    write_all(fd, "k", 1);
    printf("sent %08x got %08x\n", sent, got);
}

int main(int argc, char **argv, char **envp) {
    const char *what = argc > 1 ? argv[1] : "";
    make_table();
    if (!strcmp(what, "show")) { /* everything it was given, each string ended by a NUL */
        char folder[4096];
        for (char **s = argv; *s; s++)
            write_all(1, *s, strlen(*s) + 1);
        write_all(1, "", 1);
        for (char **s = envp; *s; s++)
            write_all(1, *s, strlen(*s) + 1);
        write_all(1, "", 1);
        if (!getcwd(folder, sizeof folder))
            fail("getcwd");
        write_all(1, folder, strlen(folder) + 1);
    } else if (!strcmp(what, "exit")) {
        return atoi(argv[2]);
    } else if (!strcmp(what, "die")) {
        signal(atoi(argv[2]), SIG_DFL);
        raise(atoi(argv[2]));
    } else if (!strcmp(what, "flood")) {
        flood(strtoull(argv[2], NULL, 10));
    } else if (!strcmp(what, "flow")) { /* until it is killed */
        flood(UINT64_MAX / 2);
    } else if (!strcmp(what, "digest")) {
        digest(argv[2]);
    } else if (!strcmp(what, "modes")) {
        for (int i = 2; i < argc; i++) {
            struct stat st;
            if (lstat(argv[i], &st))
                fail(argv[i]);
            printf("%o %lu\n", st.st_mode, (unsigned long)st.st_nlink);
        }
    } else if (!strcmp(what, "wait") || !strcmp(what, "ignore")) {
        if (*what == 'i')
            signal(SIGTERM, SIG_IGN);
        write_all(1, "ready\n", 6);
        for (;;)
            pause();
    } else if (!strcmp(what, "talk")) {
        talk(argv[2], atoi(argv[3]), strtoull(argv[4], NULL, 10), atoi(argv[5]));
    } else {
        printf("hello from the enclave\n");
    }
    return 0;
}
