/* Owns: one inline wrapper per system call; the only place that reads errno.
 * Knows nothing of: why a call is made. */
#ifndef NV_SYS_H
#define NV_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static inline int nv_sys_socket(int family, int type) {
    int ret = socket(family, type, 0);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_bind(int fd, const void *addr, socklen_t len) {
    int ret = bind(fd, addr, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_listen(int fd, int backlog) {
    int ret = listen(fd, backlog);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_connect(int fd, const void *addr, socklen_t len) {
    int ret = connect(fd, addr, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_accept4(int fd, void *addr, socklen_t *len, int flags) {
    int ret = accept4(fd, addr, len, flags);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_getsockopt(int fd, int level, int name, void *value, socklen_t *len) {
    int ret = getsockopt(fd, level, name, value, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_setsockopt(int fd, int level, int name, const void *value, socklen_t len) {
    int ret = setsockopt(fd, level, name, value, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_getfl(int fd) {
    int ret = fcntl(fd, F_GETFL);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_setfl(int fd, int flags) {
    int ret = fcntl(fd, F_SETFL, flags);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_shutdown(int fd, int how) {
    int ret = shutdown(fd, how);
    return ret < 0 ? -errno : ret;
}

static inline void nv_sys_yield(void) {
    (void)sched_yield();
}

static inline int nv_sys_unlink(const char *path) {
    int ret = unlink(path);
    return ret < 0 ? -errno : ret;
}

/* No retry on EINTR: Linux has released the descriptor by then. */
static inline int nv_sys_close(int fd) {
    int ret = close(fd);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_ppoll(struct pollfd *fds, nfds_t nfds, const struct timespec *timeout) {
    int ret = ppoll(fds, nfds, timeout, NULL);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_now_ns(void) {
    struct timespec ts = {0, 0};
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static inline int64_t nv_sys_send(int fd, const void *buf, size_t len, int flags) {
    ssize_t ret = send(fd, buf, len, flags);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_recv(int fd, void *buf, size_t len, int flags) {
    ssize_t ret = recv(fd, buf, len, flags);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_read(int fd, void *buf, size_t len) {
    ssize_t ret = read(fd, buf, len);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_pread(int fd, void *buf, size_t len, off_t offset) {
    ssize_t ret = pread(fd, buf, len, offset);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_sendfile(int out, int in, off_t *offset, size_t len) {
    ssize_t ret = sendfile(out, in, offset, len);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_splice(int in, int out, size_t len, unsigned int flags) {
    ssize_t ret = splice(in, NULL, out, NULL, len, flags);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_fstat(int fd, struct stat *st) {
    int ret = fstat(fd, st);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_fstatat(int dir_fd, const char *name, struct stat *st, int flags) {
    int ret = fstatat(dir_fd, name, st, flags);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_openat(int dir_fd, const char *name, int flags) {
    int ret = openat(dir_fd, name, flags);
    return ret < 0 ? -errno : ret;
}

static inline int64_t nv_sys_readlinkat(int dir_fd, const char *name, char *buf, size_t len) {
    ssize_t ret = readlinkat(dir_fd, name, buf, len);
    return ret < 0 ? -errno : ret;
}

/* getdents64(2): one entry; the next begins d_reclen bytes further on. */
struct nv_dirent {
    uint64_t d_ino;
    int64_t d_off;
    uint16_t d_reclen;
    uint8_t d_type;
    char d_name[];
};

/* Through syscall: glibc has a wrapper from 2.30 on only. */
static inline int64_t nv_sys_getdents(int fd, void *buf, size_t len) {
    long ret = syscall(SYS_getdents64, fd, buf, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_mmap_read(int fd, size_t len, off_t offset, void **map) {
    *map = mmap(NULL, len, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, offset);
    return *map == MAP_FAILED ? -errno : 0;
}

static inline int nv_sys_munmap(void *map, size_t len) {
    int ret = munmap(map, len);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_sigmask(int how, const sigset_t *set, sigset_t *old) {
    return -pthread_sigmask(how, set, old);
}

static inline int nv_sys_sigpending(sigset_t *set) {
    int ret = sigpending(set);
    return ret < 0 ? -errno : ret;
}

static inline int nv_sys_sigtimedwait(const sigset_t *set, const struct timespec *timeout) {
    int ret = sigtimedwait(set, NULL, timeout);
    return ret < 0 ? -errno : ret;
}

#endif
