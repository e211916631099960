#include "environ.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A string that grows up to a bound. */
struct text {
    char *bytes;
    size_t used;
    size_t size;
    bool memory; /* ran out */
};

static void text_add(struct text *text, const char *bytes, size_t length)
{
    if (text->memory)
        return;
    if (text->used + length + 1 > text->size) {
        size_t size = (text->used + length + 1) * 2;
        char *grown = realloc(text->bytes, size);
        if (!grown) {
            text->memory = true;
            return;
        }
        text->bytes = grown;
        text->size = size;
    }
    memcpy(text->bytes + text->used, bytes, length);
    text->used += length;
    text->bytes[text->used] = '\0';
}

static bool plain_name(const char *name, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        char c = name[i];
        if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_'))
            return false;
    }
    return length > 0;
}

struct applying {
    const struct env_access *access;
    struct failure *failure;
    bool failed;
};

static char *read_value(struct applying *applying, const char *name)
{
    bool ok = true;
    char *value = applying->access->get(applying->access->context, name, &ok);
    if (!ok) {
        failure_set(applying->failure, CODE_INTERNAL, NULL, "cannot read the variable %s of the task", name);
        applying->failed = true;
    }
    return value;
}

static void write_value(struct applying *applying, const char *name, const char *value)
{
    const struct env_access *access = applying->access;
    if (!(value ? access->set(access->context, name, value) : access->unset(access->context, name))) {
        failure_set(applying->failure, CODE_INTERNAL, NULL, "cannot change the variable %s of the task", name);
        applying->failed = true;
    }
}

/*
 * Append `value` to `out` with each ${@NAME@} replaced; what is inserted is not looked at again. False: the values of this
 * operation together are longer than any program could get.
 */
static bool expand(struct applying *applying, const char *value, struct text *out, size_t *budget)
{
    for (;;) {
        const char *mark = strstr(value, "${@");
        size_t plain = mark ? (size_t)(mark - value) : strlen(value);
        if (plain > *budget)
            return false;
        *budget -= plain;
        text_add(out, value, plain);
        const char *close = mark ? strstr(mark + 3, "@}") : NULL;
        if (!close)
            return true;
        if (plain_name(mark + 3, (size_t)(close - mark - 3))) {
            char *name = strndup(mark + 3, (size_t)(close - mark - 3));
            char *inserted = name ? read_value(applying, name) : NULL;
            size_t length = inserted ? strlen(inserted) : 0;
            bool fits = length <= *budget;
            if (fits && inserted)
                text_add(out, inserted, length);
            *budget -= fits ? length : 0;
            out->memory = out->memory || !name;
            free(inserted);
            free(name);
            if (!fits)
                return false;
        }
        value = close + 2;
    }
}

/* ---- lists: ordered sets of the non-empty elements of colon-separated texts */

struct element {
    const char *start; /* into a text that outlives the set */
    size_t length;
};

struct list {
    struct element *items;
    size_t count;
    uint32_t *slots; /* open addressing: index + 1 of an item, 0 free */
    size_t slot_count; /* a power of two, more than twice the items */
};

static size_t colons(const char *text)
{
    size_t count = 1;
    for (; *text; text++)
        count += *text == ':';
    return count;
}

static bool list_init(struct list *list, size_t elements)
{
    list->count = 0;
    for (list->slot_count = 16; list->slot_count < 2 * elements + 2;)
        list->slot_count *= 2;
    list->items = calloc(elements + 1, sizeof *list->items);
    list->slots = calloc(list->slot_count, sizeof *list->slots);
    return list->items && list->slots;
}

static void list_free(struct list *list)
{
    free(list->items);
    free(list->slots);
}

/* Find the slot of an element: its own, or the free one where it belongs (FNV-1a, linear probing). */
static uint32_t *list_slot(const struct list *list, struct element element)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < element.length; i++)
        hash = (hash ^ (unsigned char)element.start[i]) * 1099511628211u;
    for (size_t at = hash & (list->slot_count - 1);; at = (at + 1) & (list->slot_count - 1)) {
        uint32_t *slot = &list->slots[at];
        if (!*slot)
            return slot;
        const struct element *there = &list->items[*slot - 1];
        if (there->length == element.length && !memcmp(there->start, element.start, element.length))
            return slot;
    }
}

/* Add the elements of `text` that are neither in the list nor in `except`. */
static void list_add(struct list *list, const char *text, const struct list *except)
{
    while (*text) {
        struct element element = {text, strcspn(text, ":")};
        text += element.length + (text[element.length] == ':');
        if (!element.length || (except && *list_slot(except, element)))
            continue;
        uint32_t *slot = list_slot(list, element);
        if (!*slot) {
            list->items[list->count++] = element;
            *slot = (uint32_t)list->count;
        }
    }
}

static void list_join(const struct list *list, struct text *out)
{
    for (size_t i = 0; i < list->count; i++) {
        if (out->used)
            text_add(out, ":", 1);
        text_add(out, list->items[i].start, list->items[i].length);
    }
}

/* ---- operations */

/* Set the variable when it differs and a program could still be started; NULL unsets. */
static void put(struct applying *applying, const char *name, const char *value, const char *present)
{
    if (value && strlen(name) + 1 + strlen(value) > MAX_ENV_STRING_BYTES)
        return;
    if (value ? !present || strcmp(value, present) != 0 : present != NULL)
        write_value(applying, name, value);
}

/* Join `values` (the operation's, expanded) with what is there. False: no memory. */
static bool apply_list(struct applying *applying, const struct env_op *op, const char *values, const char *present)
{
    struct list there = {0}, missing = {0};
    struct text joined = {0};
    const char *base = op->kind == ENV_ASSIGN || !present ? "" : present;
    bool fine = list_init(&there, colons(base)) && list_init(&missing, colons(values));
    if (fine) {
        list_add(&there, base, NULL);
        list_add(&missing, values, &there);
        list_join(op->kind == ENV_PREPEND ? &missing : &there, &joined);
        list_join(op->kind == ENV_PREPEND ? &there : &missing, &joined);
        fine = !joined.memory;
    }
    if (fine)
        put(applying, op->name, joined.used ? joined.bytes : NULL, present);
    free(joined.bytes);
    list_free(&there);
    list_free(&missing);
    return fine;
}

static bool apply_one(struct applying *applying, const struct env_op *op)
{
    struct text values = {0};
    size_t budget = MAX_ENV_STRING_BYTES;
    bool fits = true;
    text_add(&values, "", 0);
    for (size_t i = 0; fits && i < op->value_count; i++) {
        if (i)
            text_add(&values, ":", 1);
        fits = expand(applying, op->values[i], &values, &budget);
    }
    char *present = applying->failed ? NULL : read_value(applying, op->name);
    bool fine = !values.memory;
    if (fine && fits && !applying->failed) {
        if (op->kind == ENV_UNSET)
            put(applying, op->name, NULL, present);
        else if (op->kind == ENV_SET)
            put(applying, op->name, values.bytes, present);
        else
            fine = apply_list(applying, op, values.bytes, present);
    }
    free(present);
    free(values.bytes);
    return fine;
}

bool environ_apply(const struct env_ops *ops, const struct env_access *access, struct failure *failure)
{
    struct applying applying = {access, failure, false};
    char *key = read_value(&applying, ENV_APPLIED);
    bool again = key && !strcmp(key, ops->applied);
    for (size_t i = 0; !applying.failed && i < ops->count; i++) {
        const struct env_op *op = &ops->items[i];
        if (again && op->kind != ENV_PREPEND && op->kind != ENV_APPEND)
            continue;
        if (!apply_one(&applying, op)) {
            failure_memory(failure);
            applying.failed = true;
        }
    }
    free(key);
    if (!applying.failed)
        write_value(&applying, ENV_APPLIED, ops->applied);
    return !applying.failed;
}
