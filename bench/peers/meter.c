/* Owns: one run of a program that knows nothing of being measured: its processor time and peak
 * memory. Small itself, since the kernel counts the memory of whoever forks into the peak of what
 * it starts. meter COMMAND ARG...     says "ready", waits for a line, runs, prints a line of JSON
 */
#include <err.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static double seconds(struct timeval t) {
    return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

int main(int argc, char **argv) {
    struct rusage usage;
    int status = 0;
    pid_t pid;

    if (argc < 2 || puts("ready") < 0 || fflush(stdout) != 0 || getchar() == EOF)
        return 2;
    pid = fork();
    if (pid < 0)
        err(2, "fork");
    if (pid == 0) {
        execvp(argv[1], argv + 1);
        err(127, "%s", argv[1]);
    }
    if (wait4(pid, &status, 0, &usage) < 0)
        err(2, "wait4");
    if (status != 0)
        errx(1, "%s: wait status %d", argv[1], status);
    printf("{\"cpu\": %.6f, \"peak\": %ld}\n", seconds(usage.ru_utime) + seconds(usage.ru_stime),
           usage.ru_maxrss * 1024);
    return 0;
}
