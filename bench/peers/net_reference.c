/* Owns: what net_reference.rs does, for machines without Rust: a thread each way, which reads into
 * a buffer as large as the guest's largest frame and writes all of it. Must not know: anything of
 * the package. net_reference GUEST_FD BACKEND_FD */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

struct way {
    int from, to;
    size_t frame_bytes;
};

static void *pass_on(void *arg) {
    const struct way *way = arg;
    uint8_t *buffer = malloc(way->frame_bytes);

    for (;;) {
        ssize_t got = read(way->from, buffer, way->frame_bytes);

        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        if (got <= 0)
            break;
        for (ssize_t done = 0; done < got;) {
            ssize_t sent = write(way->to, buffer + done, (size_t)(got - done));

            if (sent <= 0)
                err(1, "write");
            done += sent;
        }
    }
    free(buffer);
    return NULL;
}

int main(int argc, char **argv) {
    const struct timeval waits = {.tv_usec = 250000};
    uint32_t header;
    struct way there, back;
    pthread_t thread;

    if (argc != 3)
        return 2;
    there.from = back.to = atoi(argv[1]);
    there.to = back.from = atoi(argv[2]);
    if (recv(there.from, &header, sizeof(header), MSG_WAITALL) != sizeof(header))
        err(1, "no MTU");
    there.frame_bytes = back.frame_bytes = ntohl(header);
    if (setsockopt(there.to, SOL_SOCKET, SO_RCVTIMEO, &waits, sizeof(waits)) < 0)
        err(1, "SO_RCVTIMEO");
    if (pthread_create(&thread, NULL, pass_on, &back) != 0)
        errx(1, "pthread_create");
    pass_on(&there);
    return 0;
}
