/* Loaded into QEMU before 8.2, which opens the file of guest RAM for writing even when it maps it
 * private. A snapshot's memory is mapped by every clone: a VMM that was taken over must not hold a
 * descriptor that can write it. QEMU 8.2 has `readonly=on,rom=off` for this, and this is not used. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

typedef int (*open_function)(const char *, int, ...);

static int adjust(const char *path, int flags)
{
    const char *memory = getenv("KELVIN_RO_RAM");
    if (memory && path && !strcmp(path, memory) && (flags & O_ACCMODE) == O_RDWR)
        flags = (flags & ~(O_ACCMODE | O_CREAT)) | O_RDONLY;
    return flags;
}

#define WRAP(name)                                                        \
    int name(const char *path, int flags, ...)                            \
    {                                                                     \
        static open_function next;                                        \
        mode_t mode = 0;                                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {                              \
            va_list list;                                                 \
            va_start(list, flags);                                        \
            mode = va_arg(list, mode_t);                                  \
            va_end(list);                                                 \
        }                                                                 \
        if (!next)                                                        \
            next = (open_function)dlsym(RTLD_NEXT, #name);                \
        return next(path, adjust(path, flags), mode);                     \
    }

WRAP(open)
WRAP(open64)

/* What a fortified build calls when it passes no mode. */
int __open_2(const char *path, int flags)
{
    return open(path, flags);
}

int __open64_2(const char *path, int flags)
{
    return open64(path, flags);
}
