/* A disk that refuses, for tests/prove_faults.py: from the n-th write on, every write below one
   folder fails with one errno, in all processes. LD_PRELOAD it; REFUSING_DISK names a file of five
   numbers, {place to fail at, errno, places so far, 1 if only what opens or renames counts, times
   refused}, which all processes map; REFUSED_FOLDER is the folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 65536
static volatile long *numbers;
static char below[MOST]; /* file descriptors of files below the folder */
static const char *folder;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("REFUSING_DISK");
    folder = getenv("REFUSED_FOLDER");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int fd = path && folder ? real(path, O_RDWR) : -1;
    if (fd < 0) return;
    void *page = mmap(0, 5 * sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) numbers = page;
}

static int refuses(int names) {
    if (!numbers || !numbers[0] || (numbers[3] && !names)) return 0;
    if (__sync_add_and_fetch(&numbers[2], 1) < numbers[0]) return 0;
    __sync_add_and_fetch(&numbers[4], 1);
    errno = (int)numbers[1];
    return 1;
}

static int is_below(const char *path) {
    return numbers && path && !strncmp(path, folder, strlen(folder));
}

static int opened(int fd, int yes) {
    if (fd >= 0 && fd < MOST) below[fd] = (char)yes;
    return fd;
}

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        static int (*real)(const char *, int, ...);                    \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        va_list list;                                                  \
        va_start(list, flags);                                         \
        int mode = va_arg(list, int), own = WRITES(flags) && is_below(path); \
        va_end(list);                                                  \
        return own && refuses(1) ? -1 : opened(real(path, flags, mode), own); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
    int name(int at, const char *path, int flags, ...) {               \
        static int (*real)(int, const char *, int, ...);               \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        va_list list;                                                  \
        va_start(list, flags);                                         \
        int mode = va_arg(list, int), own = WRITES(flags) && is_below(path); \
        va_end(list);                                                  \
        return own && refuses(1) ? -1 : opened(real(at, path, flags, mode), own); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                    \
    FILE *name(const char *path, const char *mode) {                   \
        static FILE *(*real)(const char *, const char *);              \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        int own = strpbrk(mode, "wa+") && is_below(path);              \
        if (own && refuses(1)) return NULL;                            \
        FILE *file = real(path, mode);                                 \
        if (file) opened(fileno(file), own);                           \
        return file;                                                   \
    }
FOPEN(fopen)
FOPEN(fopen64)

int close(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "close");
    opened(fd, 0);
    return real(fd);
}

#define OF_FD(type, name, parameters, arguments)                       \
    type name parameters {                                             \
        static type (*real) parameters;                                \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        if (fd >= 0 && fd < MOST && below[fd] && refuses(0)) return -1; \
        return real arguments;                                         \
    }
OF_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
OF_FD(ssize_t, writev, (int fd, const struct iovec *parts, int many), (fd, parts, many))
OF_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
OF_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
OF_FD(int, fsync, (int fd), (fd))
OF_FD(int, ftruncate, (int fd, off_t size), (fd, size))
OF_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))

int mkdir(const char *path, mode_t mode) {
    static int (*real)(const char *, mode_t);
    struct stat there;
    if (!real) real = dlsym(RTLD_NEXT, "mkdir");
    if (is_below(path) && stat(path, &there) && refuses(1)) return -1;
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    return is_below(to) && refuses(1) ? -1 : real(from, to);
}
