/* Owns: the two ends of a network in a process each: frames into a socket, frames out of one, and
 * how long a frame takes there and back. Must not know: what relays them.
 *   traffic send FD WAY BYTES [digest]
 *   traffic receive FD BYTES [digest]
 *   traffic ping FD WAY SIZE ROUNDS
 *   traffic echo FD SIZE ROUNDS
 * WAY: "gathered", as many frames a write as 64 KiB hold, as passt does; "single", a write for each
 * header and one for each frame, as the guest does. Says "ready", waits for a line, runs, prints a
 * line of JSON. A frame is a big-endian u32, its length, and that many bytes. */
#include <arpa/inet.h>
#include <err.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEADER 4
#define FRAME 1514
#define ONE (HEADER + FRAME)
#define GATHERED (65536 / ONE)
#define ROOM (1 << 18)

static int digesting;
static uint64_t digest = 14695981039346656037u;
static uint8_t room[ROOM];

static int64_t now(void) {
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* FNV-1a. */
static void look_at(const uint8_t *data, size_t size) {
    if (!digesting)
        return;
    for (size_t i = 0; i < size; i++)
        digest = (digest ^ data[i]) * 1099511628211u;
}

static void put(int fd, const uint8_t *data, size_t size) {
    look_at(data, size);
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

        if (sent <= 0)
            err(1, "send");
        data += sent;
        size -= (size_t)sent;
    }
}

static void put_frame(int fd, const uint8_t *frame, size_t size, int gathered) {
    if (gathered) {
        put(fd, frame, HEADER + size);
    } else {
        put(fd, frame, HEADER);
        put(fd, frame + HEADER, size);
    }
}

/* Returns 0 where the stream has ended. */
static size_t take(int fd, uint8_t *data, size_t most) {
    ssize_t got = recv(fd, data, most, 0);

    if (got < 0)
        err(1, "recv");
    look_at(data, (size_t)got);
    return (size_t)got;
}

static void take_all(int fd, uint8_t *data, size_t size) {
    while (size > 0) {
        size_t got = take(fd, data, size);

        if (got == 0)
            errx(1, "the stream ended early");
        data += got;
        size -= got;
    }
}

static void fill_frames(uint8_t *at, unsigned count, uint32_t size) {
    for (unsigned i = 0; i < count; i++) {
        uint32_t header = htonl(size);

        memcpy(at, &header, HEADER);
        for (uint32_t j = 0; j < size; j++)
            at[HEADER + j] = (uint8_t)((i * 131u + j * 2654435761u) >> 13);
        at += HEADER + size;
    }
}

/* No two frames of a run are alike. */
static void number(uint8_t *at, unsigned count, uint64_t *next) {
    for (unsigned i = 0; i < count; i++, at += ONE, (*next)++)
        memcpy(at + HEADER, next, sizeof(*next));
}

static uint64_t send_bytes(int fd, int gathered, uint64_t bytes) {
    uint64_t frames = bytes / ONE, next = 0;

    fill_frames(room, GATHERED, FRAME);
    while (next < frames) {
        uint64_t left = frames - next;
        unsigned count = !gathered ? 1 : left < GATHERED ? (unsigned)left : GATHERED;

        number(room, count, &next);
        if (gathered)
            put(fd, room, (size_t)count * ONE);
        else
            put_frame(fd, room, FRAME, 0);
    }
    return frames * ONE;
}

static uint64_t receive_bytes(int fd, uint64_t bytes) {
    uint64_t wanted = bytes / ONE * ONE, done = 0;

    while (done < wanted) {
        size_t got = take(fd, room, sizeof(room));

        if (got == 0)
            break;
        done += got;
    }
    return done;
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void ping(int fd, int gathered, uint32_t size, unsigned rounds) {
    int64_t *taken = calloc(rounds, sizeof(*taken));
    uint8_t back[HEADER + FRAME];

    if (taken == NULL || size > FRAME || size < sizeof(uint64_t) || rounds == 0)
        errx(1, "ping");
    fill_frames(room, 1, size);
    for (unsigned i = 0; i < rounds; i++) {
        int64_t began = now();
        uint64_t stamp = i;

        memcpy(room + HEADER, &stamp, sizeof(stamp));
        put_frame(fd, room, size, gathered);
        take_all(fd, back, HEADER + size);
        taken[i] = now() - began;
        if (memcmp(back, room, HEADER + size) != 0)
            errx(1, "another frame came back");
    }
    qsort(taken, rounds, sizeof(*taken), compare);
    printf("{\"rounds\": %u, \"median_us\": %.3f, \"p99_us\": %.3f}\n", rounds,
           (double)taken[rounds / 2] / 1e3, (double)taken[(uint64_t)rounds * 99 / 100] / 1e3);
    free(taken);
}

static void echo(int fd, uint32_t size, unsigned rounds) {
    for (unsigned i = 0; i < rounds; i++) {
        take_all(fd, room, HEADER + size);
        put(fd, room, HEADER + size);
    }
    printf("{\"rounds\": %u}\n", rounds);
}

static int is_gathered(const char *way) {
    if (strcmp(way, "gathered") != 0 && strcmp(way, "single") != 0)
        errx(2, "%s", way);
    return *way == 'g';
}

int main(int argc, char **argv) {
    const char *verb = argc > 3 ? argv[1] : "";
    int64_t began;
    uint64_t bytes;
    int fd;

    if (*verb == 0 || puts("ready") < 0 || fflush(stdout) != 0 || getchar() == EOF)
        return 2;
    fd = atoi(argv[2]);
    digesting = strcmp(argv[argc - 1], "digest") == 0;
    began = now();
    if (strcmp(verb, "ping") == 0 && argc == 6) {
        ping(fd, is_gathered(argv[3]), (uint32_t)atoi(argv[4]), (unsigned)atoi(argv[5]));
        return 0;
    }
    if (strcmp(verb, "echo") == 0 && argc == 5) {
        echo(fd, (uint32_t)atoi(argv[3]), (unsigned)atoi(argv[4]));
        return 0;
    }
    if (strcmp(verb, "send") == 0 && argc >= 5)
        bytes = send_bytes(fd, is_gathered(argv[3]), strtoull(argv[4], NULL, 10));
    else if (strcmp(verb, "receive") == 0)
        bytes = receive_bytes(fd, strtoull(argv[3], NULL, 10));
    else
        return 2;
    printf("{\"bytes\": %" PRIu64 ", \"digest\": \"%016" PRIx64 "\", \"began_ns\": %" PRId64
           ", \"finished_ns\": %" PRId64 "}\n",
           bytes, digest, began, now());
    return 0;
}
