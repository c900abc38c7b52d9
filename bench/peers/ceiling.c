/* Owns: the most that this kernel gives, for comparison: nothing but sendfile, or send from memory
 * that is resident already, on a tuned non-blocking socket. Not a sender to use: it checks nothing.
 *   ceiling sendfile|resident|zerocopy ADDRESS HEAD ARCHIVE
 *   ceiling ranges ADDRESS HEAD ARCHIVE RANGES
 * The last is for an archive of many members: a send of 512 bytes and a sendfile for each. RANGES
 * is a file of (offset, length) pairs, the members' data in ARCHIVE. */
#include "peer.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/sendfile.h>

#define SNDBUF (4 << 20)

static void wait_room(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLOUT};

    if (errno != EAGAIN || poll(&p, 1, -1) < 0)
        err(1, "sending");
}

/* Take the notes of finished sends off the error queue; they count against a limit. */
static void take_notes(int fd) {
    char control[256];
    struct msghdr note = {.msg_control = control, .msg_controllen = sizeof(control)};

    while (recvmsg(fd, &note, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
        note.msg_controllen = sizeof(control);
}

static void send_memory(int fd, const uint8_t *data, uint64_t size, int flags) {
    for (uint64_t at = 0; at < size;) {
        ssize_t sent = send(fd, data + at, size - at, MSG_NOSIGNAL | MSG_DONTWAIT | flags);
        int error = errno;

        if (flags & MSG_ZEROCOPY)
            take_notes(fd);
        errno = error;
        if (sent < 0 && errno != ENOBUFS)
            wait_room(fd);
        else if (sent > 0)
            at += (uint64_t)sent;
    }
}

static void send_file(int fd, int from, uint64_t begin, uint64_t size) {
    off_t at = (off_t)begin;
    const off_t end = at + (off_t)size;

    while (at < end) {
        ssize_t sent = sendfile(fd, from, &at, (size_t)(end - at));

        if (sent < 0)
            wait_room(fd);
        else if (sent == 0)
            errx(1, "the archive ended early");
    }
}

static void send_members(int fd, int from, const uint8_t *ranges, uint64_t size) {
    static const uint8_t header[512];

    for (uint64_t at = 0; at < size; at += 16) {
        uint64_t range[2];

        memcpy(range, ranges + at, sizeof(range));
        send_memory(fd, header, sizeof(header), MSG_MORE);
        send_file(fd, from, range[0], range[1]);
    }
}

int main(int argc, char **argv) {
    uint64_t head_size, ranges_size = 0, size;
    const int sndbuf = SNDBUF;
    const int yes = 1;
    uint8_t *head, *ranges = NULL, *map = NULL;
    int file, fd, flags = 0;

    if (argc != 5 && argc != 6)
        return 2;
    head = read_file(argv[3], &head_size);
    file = open_file(argv[4], &size);
    if (argc == 6) {
        ranges = read_file(argv[5], &ranges_size);
    } else if (strcmp(argv[1], "sendfile") != 0) {
        map = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
        if (map == MAP_FAILED)
            err(1, "mmap");
    }
    fd = take_guest(argv[2]);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (strncmp(argv[2], "unix:", 5) == 0 &&
        setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &sndbuf, sizeof(sndbuf)) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof(sndbuf));
    if (strcmp(argv[1], "zerocopy") == 0) {
        if (setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &yes, sizeof(yes)) < 0)
            err(1, "SO_ZEROCOPY");
        flags = MSG_ZEROCOPY;
    }
    send_memory(fd, head, head_size, 0);
    if (map)
        send_memory(fd, map, size, flags);
    else if (ranges)
        send_members(fd, file, ranges, ranges_size);
    else
        send_file(fd, file, 0, size);
    send_memory(fd, (const uint8_t[]){FINISHED}, 1, 0);
    return 0;
}
