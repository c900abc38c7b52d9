/* Owns: keeping SIGPIPE from a thread that calls what cannot be told MSG_NOSIGNAL.
 * Knows nothing of: which call that is. */
#ifndef NV_SIGPIPE_H
#define NV_SIGPIPE_H

#include <errno.h>
#include <signal.h>
#include <time.h>

#include "nv_sys.h"

/* sendfile and splice cannot be told MSG_NOSIGNAL. Block SIGPIPE for this thread meanwhile and eat
 * the one a broken pipe raised, unless one was pending before: that one is not ours. */
struct nv_sigpipe_guard {
    sigset_t old;
    int was_pending;
};

static inline void nv_sigpipe_set(sigset_t *set) {
    sigemptyset(set);
    sigaddset(set, SIGPIPE);
}

static inline int nv_sigpipe_block(struct nv_sigpipe_guard *g) {
    sigset_t set;
    int ret = nv_sys_sigpending(&set);

    if (ret < 0)
        return ret;
    g->was_pending = sigismember(&set, SIGPIPE) == 1;
    nv_sigpipe_set(&set);
    return nv_sys_sigmask(SIG_BLOCK, &set, &g->old);
}

/* A call that moved bytes before the pipe broke raises the signal and returns the count, so no
 * return value says that there is none. */
static inline void nv_sigpipe_restore(const struct nv_sigpipe_guard *g) {
    const struct timespec no_time = {0, 0};
    sigset_t set;

    nv_sigpipe_set(&set);
    if (!g->was_pending)
        while (nv_sys_sigtimedwait(&set, &no_time) == -EINTR)
            continue;
    (void)nv_sys_sigmask(SIG_SETMASK, &g->old, NULL);
}

#endif
