/* Owns: what reference.rs does, for machines without Rust: the whole archive in memory, then one
 * write a field and one for the archive. reference ADDRESS EXEC_PATH ARCHIVE ARGC ARGV... ENVP...
 */
#include "peer.h"

static void put(int fd, const void *data, uint64_t size) {
    const uint8_t *at = data;

    while (size > 0) {
        ssize_t sent = write(fd, at, size);

        if (sent <= 0)
            err(1, "write");
        at += sent;
        size -= (uint64_t)sent;
    }
}

static void put_id(int fd, uint8_t id) {
    put(fd, &id, 1);
}

static void put_block(int fd, const void *data, uint64_t size) {
    put(fd, &size, sizeof(size));
    put(fd, data, size);
}

static void put_strings(int fd, uint8_t id, char **strings, uint64_t count) {
    put_id(fd, id);
    put(fd, &count, sizeof(count));
    for (uint64_t i = 0; i < count; i++)
        put_block(fd, strings[i], strlen(strings[i]) + 1);
}

int main(int argc, char **argv) {
    uint64_t size, count;
    uint8_t *archive;
    int fd;

    if (argc < 6)
        return 2;
    archive = read_file(argv[3], &size);
    count = strtoul(argv[4], NULL, 10);
    fd = take_guest(argv[1]);
    put_id(fd, READY);
    put_id(fd, 4);
    put_id(fd, 5);
    put_id(fd, 1);
    put_block(fd, argv[2], strlen(argv[2]) + 1);
    put_strings(fd, 2, argv + 5, count);
    put_strings(fd, 3, argv + 5 + count, (uint64_t)argc - 5 - count);
    put_id(fd, 0);
    put_block(fd, archive, size);
    put_id(fd, FINISHED);
    return 0;
}
