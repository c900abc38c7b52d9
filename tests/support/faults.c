/* Owns: making the n-th call of one system call fail or do less, under LD_PRELOAD. faults.py builds
 * and arms it.
 * Must not know: the library under test beyond the name of its compiled module. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum action { NONE, FAIL, SHORT, BROKEN, STRANGER, CROWD };

static struct {
    char call[24];
    int from_core; /* count calls of the compiled module, or all others */
    int nth, step; /* strike at the n-th, then at every step-th after it; step 0: once */
    enum action action;
    int value; /* errno, or a CID */
    size_t cap;
    int vsock_cid; /* >= 0: AF_VSOCK sockets are Unix sockets, and peers seem to have this CID */
} plan = {.vsock_cid = -1};

static atomic_int count, strikes;

void faults_arm(const char *call, int from_core, int nth, int step, int action, int value) {
    plan.action = NONE;
    strncpy(plan.call, call, sizeof(plan.call) - 1);
    plan.from_core = from_core;
    plan.nth = nth;
    plan.step = step;
    plan.value = value;
    count = strikes = 0;
    plan.action = (enum action)action;
}

/* No transfer of the compiled module moves more than this; 0: no bound. */
void faults_cap(size_t bytes) {
    plan.cap = bytes;
}

void faults_pretend_vsock(int cid) {
    plan.vsock_cid = cid;
}

int faults_strikes(void) {
    return strikes;
}

static int is_core(void *caller) {
    Dl_info info;

    return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "/_core.");
}

static enum action judge(const char *call, void *caller) {
    int n;

    if (plan.action == NONE || strcmp(call, plan.call) != 0 || is_core(caller) != plan.from_core)
        return NONE;
    n = ++count;
    if (n < plan.nth || (n > plan.nth && (!plan.step || (n - plan.nth) % plan.step)))
        return NONE;
    strikes++;
    if (plan.action == FAIL)
        errno = plan.value;
    return plan.action;
}

/* The kernel's behaviour where the pipe breaks in the middle of a call: the count is returned, and
 * the signal is pending. The pause lets a tick of the library fall right behind it. */
static ssize_t broken(ssize_t ret) {
    const struct timespec pause = {0, 60000000};

    pthread_kill(pthread_self(), SIGPIPE);
    nanosleep(&pause, NULL);
    return ret;
}

#define CALLER __builtin_return_address(0)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Calls that succeed or fail. */
#define PLAIN(type, name, parameters, ...)                                                         \
    type name parameters {                                                                         \
        return judge(#name, CALLER) == FAIL ? (type)(-1) : REAL(name)(__VA_ARGS__);                \
    }

/* Calls that take effect even where they report an error. */
#define AFTERWARDS(type, name, parameters, ...)                                                    \
    type name parameters {                                                                         \
        type ret = REAL(name)(__VA_ARGS__);                                                        \
        return judge(#name, CALLER) == FAIL ? (type)(-1) : ret;                                    \
    }

/* Calls that move bytes: `count` of them. */
#define TRANSFER(symbol, name, parameters, length, ...)                                            \
    ssize_t symbol parameters {                                                                    \
        enum action what = judge(#name, CALLER);                                                   \
        ssize_t ret;                                                                               \
                                                                                                   \
        if (what == FAIL)                                                                          \
            return -1;                                                                             \
        if (what != NONE)                                                                          \
            length = 1;                                                                            \
        else if (plan.cap && length > plan.cap && is_core(CALLER))                                 \
            length = plan.cap;                                                                     \
        ret = REAL(name)(__VA_ARGS__);                                                             \
        return what == BROKEN ? broken(ret) : ret;                                                 \
    }

PLAIN(int, listen, (int fd, int backlog), fd, backlog)
PLAIN(int, shutdown, (int fd, int how), fd, how)
PLAIN(int, connect, (int fd, const struct sockaddr *addr, socklen_t len), fd, addr, len)
PLAIN(int, getsockopt, (int fd, int level, int name, void *value, socklen_t *len), fd, level, name,
      value, len)
PLAIN(int, setsockopt, (int fd, int level, int name, const void *value, socklen_t len), fd, level,
      name, value, len)
PLAIN(int, ppoll,
      (struct pollfd * fds, nfds_t nfds, const struct timespec *timeout, const sigset_t *mask), fds,
      nfds, timeout, mask)
PLAIN(int, fstat, (int fd, struct stat *st), fd, st)
PLAIN(int, lstat, (const char *path, struct stat *st), path, st)
PLAIN(int, fstatat, (int dir, const char *path, struct stat *st, int flags), dir, path, st, flags)
PLAIN(ssize_t, readlinkat, (int dir, const char *path, char *buf, size_t len), dir, path, buf, len)
PLAIN(int, unlink, (const char *path), path)
PLAIN(int, eventfd, (unsigned int initial, int flags), initial, flags)
PLAIN(int, sigpending, (sigset_t * set), set)
PLAIN(int, sigtimedwait, (const sigset_t *set, siginfo_t *info, const struct timespec *timeout),
      set, info, timeout)
AFTERWARDS(int, close, (int fd), fd)
AFTERWARDS(int, munmap, (void *map, size_t len), map, len)

TRANSFER(send, send, (int fd, const void *buf, size_t len, int flags), len, fd, buf, len, flags)
TRANSFER(recv, recv, (int fd, void *buf, size_t len, int flags), len, fd, buf, len, flags)
TRANSFER(read, read, (int fd, void *buf, size_t len), len, fd, buf, len)
TRANSFER(pread, pread, (int fd, void *buf, size_t len, off_t at), len, fd, buf, len, at)
TRANSFER(sendfile, sendfile, (int out, int in, off_t *at, size_t len), len, out, in, at, len)
TRANSFER(splice, splice,
         (int in, off_t *in_at, int out, off_t *out_at, size_t len, unsigned int flags), len, in,
         in_at, out, out_at, len, flags)

/* What a build with another off_t or with _FORTIFY_SOURCE calls instead. */
TRANSFER(pread64, pread, (int fd, void *buf, size_t len, off64_t at), len, fd, buf, len, at)
TRANSFER(sendfile64, sendfile, (int out, int in, off64_t *at, size_t len), len, out, in, at, len)
TRANSFER(__recv_chk, recv, (int fd, void *buf, size_t len, size_t room, int flags), len, fd, buf,
         len + 0 * room, flags)
TRANSFER(__read_chk, read, (int fd, void *buf, size_t len, size_t room), len, fd, buf,
         len + 0 * room)
TRANSFER(__pread_chk, pread, (int fd, void *buf, size_t len, off_t at, size_t room), len, fd, buf,
         len + 0 * room, at)
TRANSFER(__pread64_chk, pread, (int fd, void *buf, size_t len, off_t at, size_t room), len, fd, buf,
         len + 0 * room, at)

int fstat64(int fd, struct stat64 *st) {
    return judge("fstat", CALLER) == FAIL ? -1 : REAL(fstat64)(fd, st);
}

int lstat64(const char *path, struct stat64 *st) {
    return judge("lstat", CALLER) == FAIL ? -1 : REAL(lstat64)(path, st);
}

int fstatat64(int dir, const char *path, struct stat64 *st, int flags) {
    return judge("fstatat", CALLER) == FAIL ? -1 : REAL(fstatat64)(dir, path, st, flags);
}

ssize_t __readlinkat_chk(int dir, const char *path, char *buf, size_t len, size_t room) {
    (void)room;
    return judge("readlinkat", CALLER) == FAIL ? -1 : REAL(readlinkat)(dir, path, buf, len);
}

/* The mode is there only where the flags say so; reading one that is not harms nobody here. */
int openat(int dir, const char *path, int flags, ...) {
    va_list more;
    mode_t mode;

    va_start(more, flags);
    mode = va_arg(more, mode_t);
    va_end(more);
    return judge("openat", CALLER) == FAIL ? -1 : REAL(openat)(dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    va_list more;
    mode_t mode;

    va_start(more, flags);
    mode = va_arg(more, mode_t);
    va_end(more);
    return judge("openat", CALLER) == FAIL ? -1 : REAL(openat64)(dir, path, flags, mode);
}

/* Six words are as many as any call takes. */
long syscall(long number, ...) {
    long words[6];
    va_list more;
    int i;

    va_start(more, number);
    for (i = 0; i < 6; i++)
        words[i] = va_arg(more, long);
    va_end(more);
    if (judge("syscall", CALLER) == FAIL)
        return -1;
    return REAL(syscall)(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}

int __openat_2(int dir, const char *path, int flags) {
    return judge("openat", CALLER) == FAIL ? -1 : REAL(openat)(dir, path, flags, 0);
}

int __openat64_2(int dir, const char *path, int flags) {
    return judge("openat", CALLER) == FAIL ? -1 : REAL(openat64)(dir, path, flags, 0);
}

int __ppoll_chk(struct pollfd *fds, nfds_t nfds, const struct timespec *timeout,
                const sigset_t *mask, size_t room) {
    (void)room;
    return judge("ppoll", CALLER) == FAIL ? -1 : REAL(ppoll)(fds, nfds, timeout, mask);
}

/* Only shared mappings: the interpreter's allocator makes private ones. */
static void *mapped(void *caller, void *at, size_t len, int prot, int flags, int fd, off_t offset) {
    if (flags & MAP_SHARED && judge("mmap", caller) == FAIL)
        return MAP_FAILED;
    return REAL(mmap)(at, len, prot, flags, fd, offset);
}

void *mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset) {
    return mapped(CALLER, at, len, prot, flags, fd, offset);
}

void *mmap64(void *at, size_t len, int prot, int flags, int fd, off64_t offset) {
    return mapped(CALLER, at, len, prot, flags, fd, offset);
}

int socket(int family, int type, int protocol) {
    if (judge("socket", CALLER) == FAIL)
        return -1;
    if (plan.vsock_cid >= 0 && family == AF_VSOCK)
        family = AF_UNIX;
    return REAL(socket)(family, type, protocol);
}

int bind(int fd, const struct sockaddr *addr, socklen_t len) {
    const struct sockaddr_un unnamed = {.sun_family = AF_UNIX};

    if (judge("bind", CALLER) == FAIL)
        return -1;
    if (plan.vsock_cid >= 0 && addr->sa_family == AF_VSOCK) /* the kernel picks an abstract name */
        return REAL(bind)(fd, (const struct sockaddr *)&unnamed, sizeof(unnamed.sun_family));
    return REAL(bind)(fd, addr, len);
}

int accept4(int fd, struct sockaddr *addr, socklen_t *len, int flags) {
    enum action what = plan.action == STRANGER ? NONE : judge("accept4", CALLER);
    int ret, pair[2];

    if (what == FAIL)
        return -1;
    if (what == CROWD) { /* somebody who is gone already */
        ret = socketpair(AF_UNIX, SOCK_STREAM | flags, 0, pair);
        REAL(close)(pair[1]);
        return ret < 0 ? ret : pair[0];
    }
    ret = REAL(accept4)(fd, addr, len, flags);
    if (ret >= 0 && plan.vsock_cid >= 0 && addr && *len >= sizeof(sa_family_t)) {
        struct sockaddr_vm *vm = (struct sockaddr_vm *)addr;

        memset(vm, 0, sizeof(*vm));
        vm->svm_family = AF_VSOCK;
        vm->svm_cid = (unsigned int)plan.vsock_cid;
        if (plan.action == STRANGER && judge("accept4", CALLER) == STRANGER)
            vm->svm_cid = (unsigned int)plan.value;
        vm->svm_port = 1024;
        *len = sizeof(*vm);
    }
    return ret;
}
