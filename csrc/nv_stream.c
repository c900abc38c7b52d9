/* Owns: moving bytes through a connected socket by the chosen way, and exact progress.
 * Knows nothing of: frames, addresses, who chose the way. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "nv_sigpipe.h"
#include "nv_stream.h"
#include "nv_sys.h"

/* Upper bound of one system call. It bounds the time away from deadline and cancel, also on a
 * socket that waits in the kernel: a sendfile waits there for every 64 KiB. Larger calls gain
 * nothing. */
#define SLICE (1u << 20)

/* Window of a mapping. Page tables are built and torn down a window at a time. */
#define WINDOW (4u << 20)

/* Whole pages on every Linux, whose pages are 4, 16 or 64 KiB. */
#define ALIGN 65536u

static uint64_t min_u64(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* Send once; wait where the socket is full. Returns bytes sent, 0 after a wait. */
static int64_t send_some(int fd, const uint8_t *buf, uint64_t length, const struct nv_wait *w,
                         struct nv_xfer *x) {
    int64_t ret;

    x->calls++;
    ret = nv_sys_send(fd, buf, (size_t)min_u64(length, SLICE), MSG_NOSIGNAL);
    if (ret == -EAGAIN)
        ret = nv_wait_fd(fd, POLLOUT, w);
    if (ret > 0)
        x->done += (uint64_t)ret;
    return ret;
}

int nv_send(int fd, const uint8_t *buf, uint64_t length, const struct nv_wait *w,
            struct nv_xfer *x) {
    while (x->done < length) {
        int64_t ret = nv_check(w);

        if (ret == 0)
            ret = send_some(fd, buf + x->done, length - x->done, w, x);
        if (ret < 0)
            return (int)ret;
    }
    return 0;
}

int nv_recv(int fd, uint8_t *buf, uint64_t length, const struct nv_wait *w, uint64_t *got) {
    for (;;) {
        int64_t ret = nv_check(w);

        if (ret < 0)
            return (int)ret;
        ret = nv_sys_recv(fd, buf, (size_t)length, MSG_DONTWAIT);
        if (ret >= 0) {
            *got = (uint64_t)ret;
            return 0;
        }
        if (ret == -EAGAIN)
            ret = nv_wait_fd(fd, POLLIN, w);
        if (ret < 0)
            return (int)ret;
    }
}

int64_t nv_send_now(int fd, const uint8_t *buf, uint64_t length) {
    return nv_sys_send(fd, buf, (size_t)min_u64(length, SLICE), MSG_DONTWAIT | MSG_NOSIGNAL);
}

int64_t nv_recv_now(int fd, uint8_t *buf, uint64_t length) {
    return nv_sys_recv(fd, buf, (size_t)min_u64(length, SLICE), MSG_DONTWAIT);
}

int nv_poll_now(int fd, int events) {
    struct pollfd one = {.fd = fd, .events = (short)events};
    struct timespec now = {0};
    int ret = nv_sys_ppoll(&one, 1, &now);

    return ret > 0 ? one.revents : ret;
}

/* The kernel's ways of saying "not this way between these two descriptors". */
static int is_refusal(int64_t ret) {
    return ret == -EINVAL || ret == -ENOSYS || ret == -EOPNOTSUPP || ret == -ESPIPE ||
           ret == -ENODEV || ret == -EACCES || ret == -EPERM;
}

/* Errors of a call between two descriptors that can only be the socket's. */
static int is_socket_error(int64_t ret) {
    return ret == -EPIPE || ret == -ECONNRESET || ret == -ENOTCONN || ret == -ECONNABORTED ||
           ret == -ENOBUFS || ret == -ENOMEM || ret == -ETIMEDOUT || ret == -EHOSTUNREACH ||
           ret == -ENETDOWN;
}

static int from_source(struct nv_xfer *x, int64_t ret) {
    x->from_source = 1;
    return (int)ret;
}

/* Wait for a source that is slow, and notice a peer that goes away meanwhile. */
static int wait_source(int fd, const struct nv_source *s, const struct nv_wait *w) {
    struct pollfd fds[NV_GUARDS + 2];
    int ret;

    fds[NV_GUARDS] = (struct pollfd){.fd = s->fd, .events = POLLIN};
    fds[NV_GUARDS + 1] = (struct pollfd){.fd = fd};
    ret = nv_wait_any(fds, NV_GUARDS + 2, w);
    if (ret < 0 || fds[NV_GUARDS].revents)
        return ret;
    return -EPIPE;
}

/* One step of a kernel-side copy. Returns bytes moved, 0 after a wait. */
static int64_t step_in_kernel(int fd, struct nv_source *s, const struct nv_wait *w,
                              struct nv_xfer *x) {
    size_t want = (size_t)min_u64(s->length - x->done, SLICE);
    int64_t ret;

    x->calls++;
    if (s->strategy == NV_SENDFILE) {
        off_t offset = (off_t)(s->offset + x->done);

        ret = nv_sys_sendfile(fd, s->fd, &offset, want);
    } else {
        ret = nv_sys_splice(s->fd, fd, want, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    }
    if (ret > 0) {
        x->done += (uint64_t)ret;
        return ret;
    }
    if (ret == 0)
        return from_source(x, -NV_E_SHORT);
    if (ret == -EAGAIN) {
        /* Either end may be the one that is not ready; a regular file always is. */
        ret = s->strategy == NV_SPLICE ? wait_source(fd, s, w) : 0;
        return ret < 0 ? ret : nv_wait_fd(fd, POLLOUT, w);
    }
    if (is_refusal(ret)) {
        s->strategy = NV_READ;
        return 0;
    }
    if (ret != -EINTR && !is_socket_error(ret))
        x->from_source = 1;
    return ret;
}

/* A mapping shows zeros between the end of the file and the end of its page, and the kernel's copy
 * from beyond fails with EFAULT. Ask the file which it was; a device has no size to ask for. */
static int is_cut_short(const struct nv_source *s, uint64_t need) {
    struct stat st;

    return nv_sys_fstat(s->fd, &st) == 0 && S_ISREG(st.st_mode) &&
           (uint64_t)st.st_size < s->offset + need;
}

/* Send one window of the file through a mapping. Returns > 0 when it moved bytes. */
static int64_t step_mapped(int fd, struct nv_source *s, const struct nv_wait *w,
                           struct nv_xfer *x) {
    uint64_t at = s->offset + x->done;
    uint64_t skip = at % ALIGN;
    uint64_t want = min_u64(s->length - x->done, WINDOW - skip);
    uint64_t end = x->done + want;
    void *map;
    int64_t ret = nv_sys_mmap_read(s->fd, (size_t)(skip + want), (off_t)(at - skip), &map);

    if (ret < 0) { /* for whatever reason: reading needs no mapping, and says what is wrong */
        s->strategy = NV_READ;
        return 0;
    }
    while (x->done < end && ret >= 0) {
        ret = nv_check(w);
        if (ret == 0)
            ret = send_some(fd, (const uint8_t *)map + skip + (want - (end - x->done)),
                            end - x->done, w, x);
    }
    (void)nv_sys_munmap(map, (size_t)(skip + want));
    if (is_cut_short(s, x->done))
        return from_source(x, -NV_E_SHORT);
    /* virtio transports before Linux 6.3 answer ENOMEM where the copy faulted. */
    if ((ret == -EFAULT || ret == -ENOMEM) && is_cut_short(s, end))
        return from_source(x, -NV_E_SHORT);
    return ret == -EFAULT ? from_source(x, ret) : ret;
}

/* Fill the staging buffer from a descriptor that can seek. O_DIRECT answers EINVAL to anything but
 * whole blocks: then read those around the wanted bytes. */
static int64_t stage_at(struct nv_source *s, uint64_t done) {
    uint64_t at = s->offset + done;
    uint64_t want = min_u64(s->length - done, s->stage_size);
    uint64_t skip = 0;
    int64_t ret = nv_sys_pread(s->fd, s->stage, (size_t)want, (off_t)at);

    if (ret == -EINVAL) {
        skip = at % ALIGN;
        want = min_u64(want, s->stage_size - skip);
        ret = nv_sys_pread(s->fd, s->stage, (size_t)s->stage_size, (off_t)(at - skip));
    }
    if (ret < 0)
        return ret;
    if ((uint64_t)ret <= skip)
        return -NV_E_SHORT;
    s->stage_pos = skip;
    s->stage_end = min_u64((uint64_t)ret, skip + want);
    return 0;
}

/* The same for one that cannot: what was read stays staged until it is sent. */
static int64_t stage_next(struct nv_source *s, uint64_t done) {
    int64_t ret = nv_sys_read(s->fd, s->stage, (size_t)min_u64(s->length - done, s->stage_size));

    if (ret == 0)
        return -NV_E_SHORT;
    if (ret == -EAGAIN)
        return 0;
    if (ret > 0) {
        s->stage_pos = 0;
        s->stage_end = (uint64_t)ret;
    }
    return ret;
}

static int64_t step_staged(int fd, struct nv_source *s, const struct nv_wait *w,
                           struct nv_xfer *x) {
    int64_t ret = 0;

    if (s->stage_pos == s->stage_end) {
        ret = s->seekable ? 0 : wait_source(fd, s, w);
        if (ret < 0)
            return ret;
        x->calls++;
        ret = s->seekable ? stage_at(s, x->done) : stage_next(s, x->done);
        if (ret < 0)
            return ret == -EINTR ? ret : from_source(x, ret);
    }
    if (s->stage_pos < s->stage_end) {
        ret = send_some(fd, s->stage + s->stage_pos, s->stage_end - s->stage_pos, w, x);
        if (ret > 0)
            s->stage_pos += (uint64_t)ret;
    }
    return ret;
}

static int64_t step(int fd, struct nv_source *s, const struct nv_wait *w, struct nv_xfer *x) {
    switch (s->strategy) {
    case NV_SENDFILE:
    case NV_SPLICE:
        return step_in_kernel(fd, s, w, x);
    case NV_MMAP:
        return step_mapped(fd, s, w, x);
    default:
        return s->stage ? step_staged(fd, s, w, x) : -NV_E_STAGE;
    }
}

int nv_send_from(int fd, struct nv_source *s, const struct nv_wait *w, struct nv_xfer *x) {
    struct nv_sigpipe_guard guard;
    int64_t ret = nv_sigpipe_block(&guard);

    if (ret < 0)
        return (int)ret;
    x->from_source = 0;
    while (x->done < s->length && ret >= 0) {
        ret = nv_check(w);
        if (ret == 0)
            ret = step(fd, s, w, x);
    }
    nv_sigpipe_restore(&guard);
    return ret < 0 ? (int)ret : 0;
}
