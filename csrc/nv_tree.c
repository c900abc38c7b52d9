/* Owns: looking at directories and gathering what is in them as tar members, many a call.
 * Knows nothing of: sockets, which members are wanted, the archive's frame; header blocks come
 * ready made, only name, mode, size, link target and checksum are filled in. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "nv_sys.h"
#include "nv_tree.h"
#include "nv_ustar.h"

#define NAME_MAX_TOTAL 65536u /* no guest opens a path this long */

/* O_NONBLOCK: what was a file may be a FIFO by now. */
#define OPEN_FILE (O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY)
#define OPEN_DIRECTORY (O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_DIRECTORY)

static int64_t to_ns(struct timespec ts) {
    return (int64_t)((uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec);
}

static void take(struct nv_entry *e, const struct stat *st) {
    e->dev = (uint64_t)st->st_dev;
    e->ino = (uint64_t)st->st_ino;
    e->rdev = (uint64_t)st->st_rdev;
    e->size = (uint64_t)st->st_size;
    e->mtime_ns = to_ns(st->st_mtim);
    e->ctime_ns = to_ns(st->st_ctim);
    e->mode = (uint32_t)st->st_mode;
}

/* 0, or why what is there now is not what was seen. */
static int compare_to_seen(const struct nv_entry *e, const struct stat *st) {
    if (e->ino != (uint64_t)st->st_ino || e->dev != (uint64_t)st->st_dev ||
        (e->mode & S_IFMT) != (st->st_mode & S_IFMT))
        return -NV_E_CHANGED;
    if (S_ISREG(st->st_mode) && (uint64_t)st->st_size < e->size)
        return -NV_E_SHORT;
    if (e->mode != (uint32_t)st->st_mode || e->size != (uint64_t)st->st_size ||
        e->mtime_ns != to_ns(st->st_mtim) || e->ctime_ns != to_ns(st->st_ctim))
        return -NV_E_CHANGED;
    return 0;
}

static uint64_t full_length(const struct nv_entry *e, uint32_t prefix_length) {
    return (uint64_t)prefix_length + e->name_length + (S_ISDIR(e->mode) ? 1u : 0u);
}

static uint64_t header_length(uint64_t name_length) {
    return name_length > NAME_ROOM ? 2 * BLOCK + padded(name_length + 1) : BLOCK;
}

static uint16_t kind_of(const struct stat *st, uint64_t large) {
    uint64_t size = (uint64_t)st->st_size;

    if (S_ISDIR(st->st_mode))
        return NV_DIRECTORY;
    if (S_ISLNK(st->st_mode))
        return size > 0 && size <= LINK_ROOM ? NV_SYMLINK : NV_OTHER;
    if (!S_ISREG(st->st_mode) || size > OCTAL_SIZE_MAX)
        return NV_OTHER;
    if (st->st_nlink > 1)
        return NV_SHARED;
    return size > large ? NV_LARGE : NV_FILE;
}

/* Opening is the only honest answer to whether a file can be read: an access control list may deny
 * what the mode allows, or allow what it denies. For root, which lists do not stop, a mode that
 * lets everybody read is enough: opening each file of a large tree twice would cost more than it
 * shows. */
static int check_readable(const struct nv_scan *s, const char *name, const struct stat *st) {
    int fd;

    if (!S_ISREG(st->st_mode) || (!s->open_all && (st->st_mode & 0444) == 0444))
        return 0;
    fd = nv_sys_openat(s->fd, name, OPEN_FILE);
    if (fd >= 0)
        (void)nv_sys_close(fd);
    return fd < 0 ? fd : 0;
}

static int scan_one(struct nv_scan *s, const char *name) {
    struct nv_entry *e = &s->entries[s->count];
    size_t length = strlen(name);
    struct stat st;
    int ret;

    if (s->count == s->room || s->names_room - s->names_used < length + 1)
        return -NV_E_ROOM;
    if (s->prefix_length + length + 1 > NAME_MAX_TOTAL)
        return -ENAMETOOLONG;
    ret = nv_sys_fstatat(s->fd, name, &st, AT_SYMLINK_NOFOLLOW);
    if (ret == 0)
        ret = check_readable(s, name, &st);
    if (ret == -ENOENT) /* gone since the directory was read: no part of the tree */
        return 0;
    if (ret < 0)
        return ret;
    take(e, &st);
    e->kind = kind_of(&st, s->large);
    e->name = (uint32_t)s->names_used;
    e->name_length = (uint16_t)length;
    memcpy(s->names + s->names_used, name, length + 1);
    s->names_used += length + 1;
    s->count++;
    return 0;
}

/* By the bytes of the names as they stand in the archive, where a directory's ends with a slash: so
 * what is in a directory comes right behind it. */
static int compare(const void *left, const void *right, void *names) {
    const struct nv_entry *a = left, *b = right;
    size_t common = a->name_length < b->name_length ? a->name_length : b->name_length;
    const unsigned char *x = (const unsigned char *)names + a->name;
    const unsigned char *y = (const unsigned char *)names + b->name;
    int order = memcmp(x, y, common);
    unsigned char p, q;

    if (order)
        return order;
    p = x[common] ? x[common] : S_ISDIR(a->mode) ? '/' : 0;
    q = y[common] ? y[common] : S_ISDIR(b->mode) ? '/' : 0;
    return p < q ? -1 : p > q;
}

static void sum_up(struct nv_scan *s) {
    uint32_t i;

    for (i = 0; i < s->count; i++) {
        const struct nv_entry *e = &s->entries[i];

        if (s->look_at_all || e->kind == NV_DIRECTORY || e->kind == NV_SHARED ||
            e->kind == NV_OTHER) {
            s->look[s->looks++] = i;
            continue;
        }
        s->length += header_length(full_length(e, s->prefix_length));
        if (e->kind != NV_SYMLINK)
            s->length += padded(e->size);
    }
}

int nv_scan(struct nv_scan *s) {
    for (;;) {
        int64_t ret;

        while (s->dents_pos < s->dents_end) {
            const struct nv_dirent *d = (const struct nv_dirent *)(s->dents + s->dents_pos);

            if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0) {
                if (nv_sys_now_ns() >= s->tick_ns)
                    return -NV_E_TICK;
                ret = scan_one(s, d->d_name);
                if (ret < 0) {
                    s->culprit = d->d_name;
                    return (int)ret;
                }
            }
            s->dents_pos += d->d_reclen;
        }
        ret = nv_sys_getdents(s->fd, s->dents, s->dents_room);
        if (ret < 0)
            return (int)ret;
        s->dents_pos = 0;
        s->dents_end = (uint32_t)ret;
        if (ret == 0)
            break;
    }
    qsort_r(s->entries, s->count, sizeof(*s->entries), compare, s->names);
    sum_up(s);
    return 0;
}

int nv_unchanged(int dir_fd, const char *name, const struct nv_entry *e) {
    struct stat st;
    int ret = nv_sys_fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH);

    return ret < 0 ? ret : compare_to_seen(e, &st);
}

int nv_open_entry(int dir_fd, const char *name, const struct nv_entry *e) {
    int fd = nv_sys_openat(dir_fd, name, S_ISDIR(e->mode) ? OPEN_DIRECTORY : OPEN_FILE);
    struct stat st;
    int ret;

    if (fd < 0)
        return fd;
    ret = nv_sys_fstat(fd, &st);
    if (ret == 0 && !S_ISDIR(e->mode))
        ret = compare_to_seen(e, &st);
    else if (ret == 0 && (e->dev != (uint64_t)st.st_dev || e->ino != (uint64_t)st.st_ino))
        ret = -NV_E_CHANGED;
    if (ret == 0)
        return fd;
    (void)nv_sys_close(fd);
    return ret;
}

static const struct nv_frame *top(const struct nv_gather *g) {
    return &g->frames[g->depth - 1];
}

static const char *name_of(const struct nv_gather *g, const struct nv_entry *e) {
    return g->dirs[top(g)->dir].names + e->name;
}

/* The first bytes of a full name into a field or the blocks of a long name. */
static void put_name(const struct nv_gather *g, const struct nv_entry *e, uint8_t *to,
                     uint64_t room) {
    uint64_t prefix = top(g)->prefix_length < room ? top(g)->prefix_length : room;
    uint64_t name = e->name_length < room - prefix ? e->name_length : room - prefix;

    memcpy(to, g->prefix, prefix);
    memcpy(to + prefix, name_of(g, e), name);
    if (S_ISDIR(e->mode) && prefix + name < room)
        to[prefix + name] = '/';
}

/* Write the header blocks at `to`, which has room for them. The last block is returned: its link
 * target and checksum are still to come. */
static uint8_t *put_header(const struct nv_gather *g, const struct nv_entry *e, uint8_t *to) {
    uint64_t name_length = full_length(e, top(g)->prefix_length);
    unsigned which = S_ISDIR(e->mode)   ? NV_TEMPLATE_DIRECTORY
                     : S_ISLNK(e->mode) ? NV_TEMPLATE_SYMLINK
                                        : NV_TEMPLATE_FILE;

    if (name_length > NAME_ROOM) {
        uint64_t blocks = padded(name_length + 1);

        memcpy(to, g->templates + NV_TEMPLATE_LONG_NAME * BLOCK, BLOCK);
        put_octal(to + SIZE_AT, 11, name_length + 1);
        put_checksum(to);
        to += BLOCK;
        memset(to, 0, blocks);
        put_name(g, e, to, name_length);
        to += blocks;
    }
    memcpy(to, g->templates + which * BLOCK, BLOCK);
    put_name(g, e, to + NAME_AT, NAME_ROOM);
    put_octal(to + MODE_AT, 7, e->mode & 07777);
    if (S_ISREG(e->mode))
        put_octal(to + SIZE_AT, 11, e->size);
    return to;
}

/* An inode's link target never changes: whether it is still that inode is all there is to ask. */
static int put_link(const struct nv_gather *g, const struct nv_entry *e, uint8_t *block) {
    const char *name = name_of(g, e);
    int dir_fd = top(g)->fd;
    char target[LINK_ROOM + 1];
    int64_t length = nv_sys_readlinkat(dir_fd, name, target, sizeof(target));
    int ret;

    if (length < 0)
        return (int)length;
    ret = nv_unchanged(dir_fd, name, e);
    if (ret < 0)
        return ret;
    if ((uint64_t)length != e->size)
        return -NV_E_CHANGED;
    memcpy(block + LINK_AT, target, (size_t)length);
    return 0;
}

/* Looked at after reading: what changed before or meanwhile shows, what comes later is not ours. */
static int read_file(const struct nv_gather *g, const struct nv_entry *e, uint8_t *to) {
    const char *name = name_of(g, e);
    int dir_fd = top(g)->fd;
    uint64_t done = 0;
    int64_t ret = 0;
    int fd, seen;

    if (e->size == 0)
        return nv_unchanged(dir_fd, name, e);
    fd = nv_sys_openat(dir_fd, name, OPEN_FILE);
    if (fd < 0)
        return fd;
    while (done < e->size) {
        ret = nv_sys_read(fd, to + done, (size_t)(e->size - done));
        if (ret <= 0)
            break;
        done += (uint64_t)ret;
    }
    if (ret != -EINTR) {
        struct stat st;

        seen = nv_sys_fstat(fd, &st);
        if (seen == 0)
            seen = compare_to_seen(e, &st);
        if (seen < 0)
            ret = seen;
        else if (ret == 0)
            ret = -NV_E_SHORT;
    }
    (void)nv_sys_close(fd);
    if (ret < 0)
        return (int)ret;
    memset(to + done, 0, (size_t)(padded(done) - done));
    return 0;
}

/* Gather one entry. g->used moves only when all of it is there. */
static int gather_one(struct nv_gather *g, const struct nv_entry *e) {
    uint64_t head = header_length(full_length(e, top(g)->prefix_length));
    uint64_t need = head + (e->kind == NV_FILE ? padded(e->size) : 0);
    uint8_t *to = g->stage + g->used;
    uint8_t *block;
    int ret = 0;

    if (need > g->stage_size - g->used)
        return g->used ? NV_STOP_FULL : -ENAMETOOLONG;
    block = put_header(g, e, to);
    if (e->kind == NV_FILE)
        ret = read_file(g, e, to + head);
    else if (e->kind == NV_SYMLINK)
        ret = put_link(g, e, block);
    else
        ret = g->fd = nv_open_entry(top(g)->fd, name_of(g, e), e);
    if (ret < 0)
        return ret;
    put_checksum(block);
    g->used += need;
    return 0;
}

/* Go into the directory that was opened last. */
static void enter(struct nv_gather *g, const struct nv_entry *e) {
    const struct nv_frame *above = top(g);
    struct nv_frame *f = &g->frames[g->depth];
    char *end = g->prefix + above->prefix_length;

    memcpy(end, name_of(g, e), e->name_length);
    end[e->name_length] = '/';
    f->fd = g->fd;
    f->dir = g->entered++;
    f->next = 0;
    f->prefix_length = above->prefix_length + e->name_length + 1u;
    g->depth++;
}

int nv_gather(struct nv_gather *g) {
    while (g->depth > 0) {
        struct nv_frame *f = &g->frames[g->depth - 1];
        const struct nv_dir *dir = &g->dirs[f->dir];
        const struct nv_entry *e = &dir->entries[f->next];
        int ret;

        if (f->next == dir->count) {
            if (g->depth == 1)
                return NV_STOP_END;
            g->depth--;
            (void)nv_sys_close(f->fd);
            continue;
        }
        if (e->kind == NV_DROPPED) {
            f->next++;
            continue;
        }
        if (e->kind == NV_OTHER || e->kind == NV_SHARED)
            return NV_STOP_OTHER;
        if (nv_sys_now_ns() >= g->tick_ns)
            return -NV_E_TICK;
        ret = gather_one(g, e);
        if (ret)
            return ret;
        f->next++;
        if (e->kind == NV_LARGE)
            return NV_STOP_OPENED;
        if (e->kind == NV_DIRECTORY)
            enter(g, e);
    }
    return NV_STOP_END; /* the caller has closed it */
}
