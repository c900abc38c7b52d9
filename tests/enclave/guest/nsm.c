/* Owns: three requests to the Nitro Secure Module, in CBOR by hand. Must not know what is measured.
 */
#include "guest.h"

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

enum { MOST = 4096, PIECE = 2048, DIGEST = 48 };

struct part {
    uint64_t address, size;
};
struct exchange {
    struct part request, response;
};
#define NSM_RAW _IOWR(0x0A, 0x0, struct exchange)

static int device = -1;

bool nsm_open(int (*await)(const char *path)) {
    device = await("/dev/nsm");
    return device >= 0;
}

/* A message in the making; more than fits is remembered by its size. */
struct message {
    uint8_t bytes[MOST];
    size_t size;
};

static void add(struct message *m, const void *data, size_t size) {
    if (m->size + size <= MOST)
        memcpy(m->bytes + m->size, data, size);
    m->size += size;
}

static void head(struct message *m, unsigned major, size_t n) {
    uint8_t out[3] = {(uint8_t)(major << 5 | (n < 24 ? n : n < 256 ? 24 : 25))};
    if (n >= 256)
        out[1] = (uint8_t)(n >> 8), out[2] = (uint8_t)n;
    else
        out[1] = (uint8_t)n;
    add(m, out, n < 24 ? 1 : n < 256 ? 2 : 3);
}

static void text(struct message *m, const char *s) {
    head(m, 3, strlen(s));
    add(m, s, strlen(s));
}

static size_t ask(struct message *m, uint8_t *answer) {
    if (m->size > MOST)
        die("a request of %zu bytes to the security module", m->size);
    struct exchange raw = {{(uintptr_t)m->bytes, m->size}, {(uintptr_t)answer, MOST}};
    if (ioctl(device, NSM_RAW, &raw) < 0)
        die("ioctl of the security module");
    if (raw.response.size > 6 && !memcmp(answer,
                                         "\xa1\x65"
                                         "Error",
                                         7))
        die("the security module says %.*s", (int)raw.response.size - 8, (char *)answer + 8);
    return raw.response.size;
}

void nsm_extend(unsigned pcr, const void *data, size_t size) {
    static struct message m;
    uint8_t answer[MOST];
    if (device < 0)
        return;
    m.size = 0;
    head(&m, 5, 1), text(&m, "ExtendPCR");
    head(&m, 5, 2), text(&m, "index"), head(&m, 0, pcr);
    text(&m, "data"), head(&m, 2, size), add(&m, data, size);
    ask(&m, answer);
}

void nsm_extend_pieces(unsigned pcr, const void *data, size_t size) {
    if (device < 0)
        return;
    for (const uint8_t *at = data; size;) {
        size_t part = size < PIECE ? size : PIECE;
        nsm_extend(pcr, at, part);
        at += part;
        size -= part;
    }
}

void nsm_lock(unsigned range) {
    static struct message m;
    uint8_t answer[MOST];
    if (device < 0)
        return;
    m.size = 0;
    head(&m, 5, 1), text(&m, "LockPCRs"), head(&m, 5, 1), text(&m, "range"), head(&m, 0, range);
    ask(&m, answer);
}

void nsm_show(unsigned pcr) {
    static struct message m;
    uint8_t answer[MOST];
    if (device < 0)
        return;
    m.size = 0;
    head(&m, 5, 1), text(&m, "DescribePCR"), head(&m, 5, 1), text(&m, "index"), head(&m, 0, pcr);
    size_t n = ask(&m, answer);
    for (size_t i = 0; i + 2 + DIGEST <= n; i++)
        if (answer[i] == 0x58 && answer[i + 1] == DIGEST) { /* the only byte string of that size */
            char hex[2 * DIGEST + 1];
            for (size_t k = 0; k < DIGEST; k++)
                snprintf(hex + 2 * k, 3, "%02x", answer[i + 2 + k]);
            /* Behind a key: "lock" true is 0xf5. */
            bool locked = memmem(answer, n, "\x64lock\xf5", 6) != NULL;
            say("PCR%u=%s%s", pcr, hex, locked ? " locked" : "");
            return;
        }
    say("PCR%u=?", pcr);
}
