/* Owns: frames between a tap device and a connected socket, as the guest's network has them there:
 * a big-endian u32 length before each. Must not know: who is at the other end. usage: tap_pump NAME
 * FD; says "ready" once the device is there; ends with the socket. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ROOM = 1 << 20 };

/* Both sides may be full at once: neither direction ever waits for the other. */
static uint8_t in[ROOM], out[ROOM];

int main(int argc, char **argv) {
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK), sock = argc > 2 ? atoi(argv[2]) : -1;
    struct ifreq wanted = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    size_t have = 0, begin = 0, end = 0;

    if (argc < 3 || tap < 0)
        return 2;
    strncpy(wanted.ifr_name, argv[1], IFNAMSIZ - 1);
    if (ioctl(tap, TUNSETIFF, &wanted) < 0)
        return 3;
    if (puts("ready") < 0 || fflush(stdout))
        return 4;
    for (;;) {
        struct pollfd fds[2] = {
            {.fd = begin == end ? tap : -1, .events = POLLIN},
            {.fd = sock, .events = (short)(POLLIN | (begin < end ? POLLOUT : 0))},
        };
        ssize_t sent;

        if (poll(fds, 2, -1) < 0)
            return 5;
        if (begin == end) {
            begin = end = 0;
            while (end + 4 + 65549 <= ROOM) {
                ssize_t size = read(tap, out + end + 4, 65549);
                uint32_t length = htonl((uint32_t)size);

                if (size < 0)
                    break;
                memcpy(out + end, &length, 4);
                end += 4 + (size_t)size;
            }
        }
        if (begin < end) {
            sent = send(sock, out + begin, end - begin, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent < 0 && errno != EAGAIN)
                return 0;
            begin += sent > 0 ? (size_t)sent : 0;
        }
        if (fds[1].revents & ~POLLOUT) {
            ssize_t got = recv(sock, in + have, ROOM - have, MSG_DONTWAIT);
            size_t at = 0;

            if (got == 0 || (got < 0 && errno != EAGAIN))
                return 0;
            have += got > 0 ? (size_t)got : 0;
            while (have - at >= 4) {
                uint32_t length;

                memcpy(&length, in + at, 4);
                length = ntohl(length);
                if (length > 65549)
                    return 6;
                if (have - at < 4 + length)
                    break;
                if (write(tap, in + at + 4, length) < 0 && errno != EAGAIN && errno != EIO)
                    return 7;
                at += 4 + length;
            }
            memmove(in, in + at, have - at);
            have -= at;
        }
    }
}
