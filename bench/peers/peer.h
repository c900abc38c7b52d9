/* Owns: what every compiled peer does before its first byte: listen, accept, take the ready byte.
 * Must not know: how a peer moves bytes, nor anything of the package. */
#ifndef PEER_H
#define PEER_H

#include <err.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define READY 0xb7
#define FINISHED 255

/* Listen at unix:PATH or vsock:CID:PORT, take one guest and its ready byte; return the connection.
 */
static inline int take_guest(const char *address) {
    union {
        struct sockaddr any;
        struct sockaddr_vm vm;
        struct sockaddr_un un;
    } a;
    socklen_t len = sizeof(a.vm);
    uint8_t ready;
    int listener, fd;

    memset(&a, 0, sizeof(a));
    if (strncmp(address, "unix:", 5) == 0) {
        a.un.sun_family = AF_UNIX;
        snprintf(a.un.sun_path, sizeof(a.un.sun_path), "%s", address + 5);
        len = sizeof(a.un);
    } else {
        a.vm.svm_family = AF_VSOCK;
        a.vm.svm_cid = VMADDR_CID_ANY;
        a.vm.svm_port = (unsigned)strtoul(strrchr(address, ':') + 1, NULL, 10);
    }
    listener = socket(a.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, &a.any, len) < 0 || listen(listener, 1) < 0)
        err(1, "%s", address);
    fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0 || read(fd, &ready, 1) != 1)
        err(1, "no guest");
    close(listener);
    if (a.any.sa_family == AF_UNIX)
        unlink(a.un.sun_path);
    return fd;
}

/* Open a file; return its descriptor and size. */
static inline int open_file(const char *path, uint64_t *size) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &st) < 0)
        err(1, "%s", path);
    *size = (uint64_t)st.st_size;
    return fd;
}

/* Read a whole file into memory that is allocated for it. */
static inline uint8_t *read_file(const char *path, uint64_t *size) {
    int fd = open_file(path, size);
    uint8_t *data = malloc(*size ? *size : 1);
    uint64_t at = 0;

    while (data && at < *size) {
        ssize_t got = read(fd, data + at, *size - at);

        if (got <= 0)
            err(1, "%s", path);
        at += (uint64_t)got;
    }
    if (data == NULL)
        err(1, "%s", path);
    close(fd);
    return data;
}

#endif
