/* Owns: sockets before any byte flows: listen, connect, accept, peer identity, buffer size.
 * Knows nothing of: what is said over them. */
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

/* After sys/socket.h, which kernel headers before 6.5 use without including it. */
#include <linux/vm_sockets.h>

#include "nv_socket.h"
#include "nv_sys.h"

#define STREAM_FLAGS (SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)

/* A connect to a Unix socket with a full backlog answers EAGAIN and cannot be polled for. */
#define UNIX_RETRY_NS 2000000

union address {
    struct sockaddr any;
    struct sockaddr_vm vm;
    struct sockaddr_un un;
};

static socklen_t vsock_address(union address *a, uint32_t cid, uint32_t port) {
    memset(a, 0, sizeof(*a));
    a->vm.svm_family = AF_VSOCK;
    a->vm.svm_cid = cid;
    a->vm.svm_port = port;
    return sizeof(a->vm);
}

static int unix_address(union address *a, const char *path, uint32_t length) {
    memset(a, 0, sizeof(*a));
    if (length == 0 || length >= sizeof(a->un.sun_path))
        return -ENAMETOOLONG;
    a->un.sun_family = AF_UNIX;
    memcpy(a->un.sun_path, path, length);
    return (int)(offsetof(struct sockaddr_un, sun_path) + length + 1);
}

static int listen_at(const union address *a, socklen_t len, int backlog) {
    int fd = nv_sys_socket(a->any.sa_family, STREAM_FLAGS);
    int ret;

    if (fd < 0)
        return fd;
    ret = nv_sys_bind(fd, a, len);
    if (ret < 0)
        goto fail;
    ret = nv_sys_listen(fd, backlog);
    if (ret == 0)
        return fd;
    if (a->any.sa_family == AF_UNIX)
        (void)nv_sys_unlink(a->un.sun_path);
fail:
    (void)nv_sys_close(fd);
    return ret;
}

int nv_listen_vsock(uint32_t cid, uint32_t port, int backlog) {
    union address a;
    socklen_t len = vsock_address(&a, cid, port);

    return listen_at(&a, len, backlog);
}

int nv_listen_unix(const char *path, uint32_t length, int backlog) {
    union address a;
    int len = unix_address(&a, path, length);

    return len < 0 ? len : listen_at(&a, (socklen_t)len, backlog);
}

/* Wait for a connect that is under way and fetch its outcome. */
static int connect_outcome(int fd, const struct nv_wait *w) {
    int error = 0;
    socklen_t len = sizeof(error);
    int ret = nv_wait_fd(fd, POLLOUT, w);

    if (ret < 0)
        return ret;
    ret = nv_sys_getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len);
    return ret < 0 ? ret : -error;
}

static int connect_to(const union address *a, socklen_t len, const struct nv_wait *w,
                      int32_t *fd_out) {
    int ret;

    if (*fd_out >= 0)
        return connect_outcome(*fd_out, w);
    ret = nv_sys_socket(a->any.sa_family, STREAM_FLAGS);
    if (ret < 0)
        return ret;
    *fd_out = ret;
    ret = nv_sys_connect(*fd_out, a, len);
    return ret == -EINPROGRESS ? connect_outcome(*fd_out, w) : ret;
}

int nv_connect_vsock(uint32_t cid, uint32_t port, const struct nv_wait *w, int32_t *fd_out) {
    union address a;
    socklen_t len = vsock_address(&a, cid, port);

    return connect_to(&a, len, w, fd_out);
}

int nv_connect_unix(const char *path, uint32_t length, const struct nv_wait *w, int32_t *fd_out) {
    union address a;
    int len = unix_address(&a, path, length);
    int ret;

    if (len < 0)
        return len;
    if (*fd_out < 0) {
        ret = nv_sys_socket(AF_UNIX, STREAM_FLAGS);
        if (ret < 0)
            return ret;
        *fd_out = ret;
    }
    for (;;) {
        struct nv_wait pause = *w;
        int64_t soon = nv_sys_now_ns() + UNIX_RETRY_NS;

        ret = nv_sys_connect(*fd_out, &a, (socklen_t)len);
        if (ret != -EAGAIN)
            return ret;
        if (soon < pause.tick_ns)
            pause.tick_ns = soon;
        ret = nv_wait_fd(-1, 0, &pause);
        if (ret != -NV_E_TICK || nv_sys_now_ns() >= w->tick_ns)
            return ret;
    }
}

static int identify(int fd, const union address *a, struct nv_peer *peer) {
    struct ucred who = {0, 0, 0};
    socklen_t len = sizeof(who);
    int ret;

    memset(peer, 0, sizeof(*peer));
    peer->family = a->any.sa_family;
    if (a->any.sa_family == AF_VSOCK) {
        peer->cid = a->vm.svm_cid;
        peer->port = a->vm.svm_port;
        return 0;
    }
    ret = nv_sys_getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len);
    if (ret < 0)
        return ret;
    peer->pid = who.pid;
    peer->uid = who.uid;
    peer->gid = who.gid;
    return 0;
}

int nv_accept(int listen_fd, struct nv_peer *peer, int32_t *fd_out) {
    union address a;
    socklen_t len;
    int fd;

    do {
        len = sizeof(a);
        memset(&a, 0, sizeof(a));
        fd = nv_sys_accept4(listen_fd, &a, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
    } while (fd == -ECONNABORTED || fd == -EPROTO); /* that peer is gone, the socket is fine */
    if (fd < 0)
        return fd;
    *fd_out = fd;
    return identify(fd, &a, peer);
}

int nv_enlarge_sndbuf(int fd, int want, int32_t *got) {
    int value = 0;
    socklen_t len = sizeof(value);
    int ret;

    /* The kernel stores twice what is asked, so compare with that and never shrink. */
    ret = nv_sys_getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, &len);
    if (ret < 0)
        return ret;
    if (value / 2 < want) {
        /* FORCE needs CAP_NET_ADMIN; without it net.core.wmem_max caps the request silently. */
        ret = nv_sys_setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &want, sizeof(want));
        if (ret < 0)
            ret = nv_sys_setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &want, sizeof(want));
        if (ret < 0)
            return ret;
        len = sizeof(value);
        ret = nv_sys_getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, &len);
        if (ret < 0)
            return ret;
    }
    *got = value;
    return 0;
}

int nv_block_briefly(int fd, int usec) {
    const struct timeval limit = {.tv_sec = usec / 1000000, .tv_usec = usec % 1000000};
    int ret = nv_sys_setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));

    if (ret < 0)
        return ret;
    ret = nv_sys_getfl(fd);
    return ret < 0 ? ret : nv_sys_setfl(fd, ret & ~O_NONBLOCK);
}
