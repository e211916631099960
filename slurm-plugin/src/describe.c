#include "describe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *begin(char **text, size_t *size)
{
    *text = NULL;
    return open_memstream(text, size);
}

static char *finish(FILE *stream, char **text)
{
    bool failed = ferror(stream) != 0;
    if (fclose(stream) != 0 || failed) {
        free(*text);
        return NULL;
    }
    return *text;
}

static const char *source_of(const struct mount_point *mount)
{
    return mount->digest ? mount->digest : mount->label;
}

char *describe_mounts(const struct mounts *mounts)
{
    char *text;
    size_t size;
    FILE *out = begin(&text, &size);
    if (!out)
        return NULL;
    for (size_t i = 0; i < mounts->count; i++)
        fprintf(out, "%s%s:%s", i ? "," : "", source_of(&mounts->items[i]), mounts->items[i].path);
    return finish(out, &text);
}

char *describe_labels(const struct mounts *mounts)
{
    char *text;
    size_t size;
    FILE *out = begin(&text, &size);
    if (!out)
        return NULL;
    for (size_t i = 0; i < mounts->count; i++)
        fprintf(out, "%s%s", i ? "," : "", mounts->items[i].label);
    return finish(out, &text);
}

char *describe_digests(const struct mounts *mounts)
{
    char *text;
    size_t size;
    FILE *out = begin(&text, &size);
    if (!out)
        return NULL;
    for (size_t i = 0; i < mounts->count; i++)
        fprintf(out, "%s%s", i ? "," : "", mounts->items[i].digest ? mounts->items[i].digest : "");
    return finish(out, &text);
}

static const struct mount_point *find_source(const struct mounts *mounts, const char *source, size_t length)
{
    for (size_t i = 0; i < mounts->count; i++) {
        const char *candidate = source_of(&mounts->items[i]);
        if (strlen(candidate) == length && !strncmp(candidate, source, length))
            return &mounts->items[i];
    }
    return NULL;
}

char *describe_views(const struct mounts *mounts, const char *applied)
{
    char *text;
    size_t size;
    bool first = true;
    FILE *out = begin(&text, &size);
    if (!out)
        return NULL;
    while (*applied) {
        size_t part = strcspn(applied, ";"), identity = strcspn(applied, "[;");
        const struct mount_point *mount = NULL;
        if (identity + 1 < part && applied[part - 1] == ']')
            mount = find_source(mounts, applied, identity);
        size_t at = identity + 1, end = part - 1;
        while (mount && at < end) {
            size_t view = strcspn(applied + at, ",]");
            if (view)
                fprintf(out, "%s%s:%.*s:%.*s", first ? "" : ",", mount->path, (int)strcspn(mount->label, "/"), mount->label,
                        (int)view, applied + at);
            first = first && !view;
            at += view + 1;
        }
        applied += part + (applied[part] == ';');
    }
    return finish(out, &text);
}
