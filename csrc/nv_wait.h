/* Owns: when a call gives up, what its return value means, and waiting until then.
 * Knows nothing of: what is waited for. */
#ifndef NV_WAIT_H
#define NV_WAIT_H

#include <errno.h>
#include <poll.h>
#include <stdint.h>

/* Every function returns >= 0, or a negative errno value. These values never come from the system
 * calls used here, and carry a meaning of our own: */
#define NV_E_TICK EAGAIN         /* wait.tick_ns has passed; nothing failed, call again */
#define NV_E_DEADLINE ETIME      /* wait.deadline_ns has passed */
#define NV_E_CANCELLED ECANCELED /* wait.cancel_fd became readable */
#define NV_E_DIED EOWNERDEAD     /* wait.watch_fd hung up */
#define NV_E_SHORT ENODATA       /* the source ended before its declared length */
#define NV_E_PEER EREMCHG        /* strict gate: a peer with another CID connected */
#define NV_E_READY EBADMSG       /* the peer's first byte is not the ready byte */
#define NV_E_ROOM ENOSR          /* the caller's memory is full; give more and call again */
#define NV_E_CHANGED ENOTUNIQ    /* what has this name now is not what was seen before */
#define NV_E_STAGE EXFULL        /* nv_source.stage is needed after all; set it and call again */

#define NV_GUARDS 2 /* entries of a poll that waiting keeps for itself */

/* When a call must give up. Times are absolute CLOCK_MONOTONIC nanoseconds. tick_ns bounds how long
 * C stays away from its caller, so that signal handlers and progress reports run. A descriptor of
 * -1 is not watched. */
struct nv_wait {
    int64_t deadline_ns;
    int64_t tick_ns;
    int32_t cancel_fd;
    int32_t watch_fd;
};

/* Wait until one of fds[NV_GUARDS..count) has an event; the first NV_GUARDS entries are filled in
 * here. Returns 0 with revents set, or -NV_E_CANCELLED, -NV_E_DIED, -NV_E_DEADLINE, -NV_E_TICK in
 * this order of precedence. */
int nv_wait_any(struct pollfd *fds, nfds_t count, const struct nv_wait *w);

/* The same for one descriptor. */
int nv_wait_fd(int fd, short events, const struct nv_wait *w);

/* The same verdicts without waiting: 0, or why the caller must stop now. The two guards are looked
 * at once a tick only, so the call is cheap enough for every iteration. */
int nv_check(const struct nv_wait *w);

#endif
