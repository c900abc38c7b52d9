/* Owns: waiting to an absolute deadline beside a cancel and a watched descriptor.
 * Knows nothing of: what is waited for. */
#include <errno.h>
#include <poll.h>
#include <time.h>

#include "nv_sys.h"
#include "nv_wait.h"

enum { CANCEL, WATCH };

int nv_wait_any(struct pollfd *fds, nfds_t count, const struct nv_wait *w) {
    int64_t until = w->deadline_ns < w->tick_ns ? w->deadline_ns : w->tick_ns;
    int64_t now = nv_sys_now_ns();
    int64_t left = until > now ? until - now : 0;
    struct timespec ts = {.tv_sec = (time_t)(left / 1000000000),
                          .tv_nsec = (long)(left % 1000000000)};
    int ret;

    /* poll skips negative descriptors, and reports hang-up and error without being asked. */
    fds[CANCEL] = (struct pollfd){.fd = w->cancel_fd, .events = POLLIN};
    fds[WATCH] = (struct pollfd){.fd = w->watch_fd};
    ret = nv_sys_ppoll(fds, count, &ts);
    if (ret < 0)
        return ret;
    if (fds[CANCEL].revents)
        return -NV_E_CANCELLED;
    if (fds[WATCH].revents & (POLLHUP | POLLERR | POLLNVAL))
        return -NV_E_DIED;
    if (ret > 0)
        return 0;
    return nv_sys_now_ns() >= w->deadline_ns ? -NV_E_DEADLINE : -NV_E_TICK;
}

int nv_wait_fd(int fd, short events, const struct nv_wait *w) {
    struct pollfd fds[NV_GUARDS + 1];
    int ret;

    fds[NV_GUARDS] = (struct pollfd){.fd = fd, .events = events};
    ret = nv_wait_any(fds, NV_GUARDS + 1, w);
    return ret == 0 && (fds[NV_GUARDS].revents & POLLNVAL) ? -EBADF : ret;
}

int nv_check(const struct nv_wait *w) {
    struct pollfd guards[NV_GUARDS];
    int64_t now = nv_sys_now_ns();

    if (now < w->deadline_ns && now < w->tick_ns)
        return 0;
    return nv_wait_any(guards, NV_GUARDS, w);
}
