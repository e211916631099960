#include "session.h"

#include "choice.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SOURCE_PREFIX "uenvd:"
#define DIGEST_PREFIX "sha256:"
/* Every srun reads the table, so in few and large pieces; stdio takes 1 kB at a time of files in /proc. */
#define PIECE_BYTES ((size_t)16 * 1024)
#define DIGEST_LENGTH (sizeof DIGEST_PREFIX - 1 + 64)

/* ---- mountinfo */

/* A copy of a field, which ends at a space, with its octal escapes undone. */
static char *field_text(const char *field)
{
    size_t length = strcspn(field, " \n"), used = 0;
    char *text = malloc(length + 1);
    if (!text)
        return NULL;
    for (size_t i = 0; i < length; i++) {
        if (field[i] == '\\' && i + 3 < length && strspn(field + i + 1, "01234567") >= 3) {
            text[used++] = (char)((field[i + 1] - '0') * 64 + (field[i + 2] - '0') * 8 + (field[i + 3] - '0'));
            i += 3;
        } else {
            text[used++] = field[i];
        }
    }
    text[used] = '\0';
    return text;
}

/* The `number`-th field from here (0: this one) of a line, NULL when there are fewer. */
static const char *nth_field(const char *line, int number)
{
    for (; number > 0; number--) {
        line += strcspn(line, " \n");
        if (*line != ' ')
            return NULL;
        line++;
    }
    return *line && *line != '\n' ? line : NULL;
}

static void forget_mount(struct session *session, const char *mount)
{
    for (size_t i = 0; i < session->count; i++) {
        if (strcmp(session->items[i].mount, mount))
            continue;
        free(session->items[i].source);
        free(session->items[i].mount);
        memmove(&session->items[i], &session->items[i + 1], (session->count - i - 1) * sizeof *session->items);
        session->count--;
        return;
    }
}

/* Take both texts, or free them. */
static bool add_mount(struct session *session, char *source, char *mount)
{
    struct session_image *grown = source && mount ? realloc(session->items, (session->count + 1) * sizeof *grown) : NULL;
    if (!grown) {
        free(source);
        free(mount);
        return false;
    }
    session->items = grown;
    session->items[session->count++] = (struct session_image){source, mount};
    return true;
}

/* Whether root or the user himself has made a FUSE mount. Any user may have fusermount3 make one with whatever source he likes, which all others
 * see; whose it is the kernel tells (fs/fuse/inode.c: fuse_show_options). */
static bool is_believed(const char *options)
{
    static const char key[] = "user_id=";
    while (options && strncmp(options, key, sizeof key - 1)) {
        options += strcspn(options, ", \n");
        options = *options == ',' ? options + 1 : NULL;
    }
    unsigned long owner = options ? strtoul(options + sizeof key - 1, NULL, 10) : 0;
    return options && (owner == 0 || owner == getuid());
}

static bool parse_line(const char *line, struct session *session)
{
    const char *end = line + strcspn(line, "\n");
    const char *mount = nth_field(line, 4), *tail = strstr(line, " - ");
    if (!mount || *mount != '/' || !tail || tail > end)
        return true;
    const char *type = tail + 3, *source = nth_field(type, 1);
    char *point = field_text(mount);
    if (!point)
        return false;
    forget_mount(session, point);
    if (source && !strncmp(type, "fuse", 4) && !strncmp(source, SOURCE_PREFIX, sizeof SOURCE_PREFIX - 1) &&
        is_believed(nth_field(source, 1)))
        return add_mount(session, field_text(source + sizeof SOURCE_PREFIX - 1), point);
    free(point);
    return true;
}

bool session_parse(const char *text, struct session *session, struct failure *failure)
{
    *session = (struct session)SESSION_NONE;
    if (!strstr(text, " " SOURCE_PREFIX))
        return true; /* nearly always; a node may have hundreds of mounts */
    while (*text) {
        if (!parse_line(text, session)) {
            session_free(session);
            return failure_memory(failure);
        }
        text += strcspn(text, "\n");
        text += *text == '\n';
    }
    return true;
}

/* The rest of a file as a text to be freed; NULL: no memory. */
static char *read_all(int file)
{
    char *text = NULL;
    size_t size = 0, used = 0;
    for (;;) {
        if (size - used < PIECE_BYTES) {
            size = 2 * size + 2 * PIECE_BYTES;
            char *grown = realloc(text, size);
            if (!grown) {
                free(text);
                return NULL;
            }
            text = grown;
        }
        ssize_t got = read(file, text + used, size - used - 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        used += (size_t)got;
    }
    text[used] = '\0';
    return text;
}

bool session_read(struct session *session, struct failure *failure)
{
    *session = (struct session)SESSION_NONE;
    int file = open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return true;
    char *text = read_all(file);
    bool fine = text ? session_parse(text, session, failure) : failure_memory(failure);
    free(text);
    close(file);
    return fine;
}

void session_free(struct session *session)
{
    for (size_t i = 0; i < session->count; i++) {
        free(session->items[i].source);
        free(session->items[i].mount);
    }
    free(session->items);
    *session = (struct session)SESSION_NONE;
}

char *session_place(void)
{
    char host[256] = "", *text = NULL;
    struct stat status;
    if (gethostname(host, sizeof host - 1) < 0 || stat("/proc/self/ns/mnt", &status) < 0)
        return NULL;
    return asprintf(&text, "%s/%ju", host, (uintmax_t)status.st_ino) < 0 ? NULL : text;
}

/* ---- as description lists */

char *session_describe(const struct session *session)
{
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    for (size_t i = 0; i < session->count; i++) {
        const struct session_image *image = &session->items[i];
        fprintf(out, "%s%s%s:%s", i ? "," : "", image->source[0] == '/' ? "" : "@", image->source, image->mount);
    }
    if (fclose(out) == 0)
        return text;
    free(text);
    return NULL;
}

/* Whether one description names this image. */
static bool names(const char *text, size_t length, const struct session_image *image)
{
    size_t source_length = strlen(image->source), mount_length = strlen(image->mount);
    const char *rest;
    if (image->source[0] == '/') {
        if (length < source_length || strncmp(text, image->source, source_length))
            return false;
        rest = text + source_length;
    } else {
        const char *at = memmem(text, length, image->source, source_length);
        if (!at || at == text || at[-1] != '@' || source_length != DIGEST_LENGTH)
            return false;
        rest = at + source_length;
    }
    size_t left = length - (size_t)(rest - text);
    return left == 0 || (left == mount_length + 1 && rest[0] == ':' && !strncmp(rest + 1, image->mount, mount_length));
}

bool session_matches(const struct session *session, const char *images)
{
    size_t count = 0;
    while (*images) {
        size_t length = strcspn(images, ","), i = 0;
        while (i < session->count && !names(images, length, &session->items[i]))
            i++;
        if (length > 0 && i == session->count)
            return false;
        count += length > 0;
        images += length + (images[length] == ',');
    }
    return count == session->count;
}

static bool is_name(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if (!isalnum((unsigned char)text[i]) && !strchr("_-.", text[i]))
            return false;
    return true;
}

/* Write the view of one entry "mount:uenv:view" if its mount is an image's. */
static bool write_view(FILE *out, bool first, const struct session *session, const char *entry, size_t length)
{
    const char *view = memrchr(entry, ':', length);
    const char *name = view ? memrchr(entry, ':', (size_t)(view - entry)) : NULL;
    if (!name || view + 1 == entry + length)
        return false;
    size_t mount_length = (size_t)(name - entry), view_length = (size_t)(entry + length - view - 1);
    size_t name_length = (size_t)(view - name - 1);
    if (!is_name(name + 1, name_length) || !is_name(view + 1, view_length))
        return false;
    for (size_t i = 0; i < session->count; i++) {
        const char *mount = session->items[i].mount;
        if (strlen(mount) == mount_length && !strncmp(mount, entry, mount_length)) {
            fprintf(out, "%s%.*s%s%.*s", first ? "" : ",", (int)name_length, name + 1, name_length ? ":" : "", (int)view_length,
                    view + 1);
            return true;
        }
    }
    return false;
}

char *session_views(const struct session *session, const char *loaded)
{
    char *text = NULL;
    size_t size;
    bool first = true;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    while (loaded && *loaded) {
        size_t length = strcspn(loaded, ",");
        if (write_view(out, first, session, loaded, length))
            first = false;
        loaded += length + (loaded[length] == ',');
    }
    if (first)
        fputs(VIEW_NONE, out);
    if (fclose(out) == 0)
        return text;
    free(text);
    return NULL;
}
