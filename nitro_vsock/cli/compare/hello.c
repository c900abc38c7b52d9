/* Owns: what the demonstration runs in its enclave: one static program that needs nothing.
 * Must not know: who runs it. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* hello STATUS FOLDER: says where it is and what it was given, counts a folder, exits as told. */
int main(int argc, char **argv) {
    const char *folder = argc > 2 ? argv[2] : "/";
    const char *greeting = getenv("GREETING");
    DIR *dir = opendir(folder);
    int entries = 0;

    while (dir && readdir(dir))
        entries++;
    printf("hello from the enclave: process %d, user %d\n", (int)getpid(), (int)getuid());
    printf("GREETING is %s\n", greeting ? greeting : "not set");
    printf("%s has %d entries\n", folder, entries - 2);
    return argc > 1 ? atoi(argv[1]) : 0;
}
