/* The smallest test frame that does: tests register themselves, a failed CHECK ends the run with its place. */
#ifndef UENVD_CHECK_H
#define UENVD_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};

void test_register(struct test *test);
/* Why a test cannot run here; the runner prints it and goes on. */
void test_skip(const char *reason);
/* The directory tests/vectors. */
extern const char *vectors_dir;
/* Parse a file below it; the caller puts the object. */
struct json_object *read_vectors(const char *name);
/* A fresh directory of this run, removed at its end. */
const char *scratch_dir(void);

/* fork(), for a process with one thread: the child ends with the run, also when the run is killed. */
pid_t test_fork(void);

/* The next allocation but `count` (from 0) of the code under test fails; -1: none does. */
extern long fail_allocation;
/* The table that session_read() reads; NULL: the kernel's. */
extern const char *mounted;

#define TEST(identifier)                                                                                     \
    static void identifier(void);                                                                            \
    static struct test test_of_##identifier = {#identifier, identifier, NULL};                               \
    __attribute__((constructor)) static void register_##identifier(void)                                     \
    {                                                                                                        \
        test_register(&test_of_##identifier);                                                                \
    }                                                                                                        \
    static void identifier(void)

#define CHECK(condition) CHECK_IN(condition, "")
#define CHECK_IN(condition, what)                                                                            \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s [%s]\n", __FILE__, __LINE__, #condition, what);                       \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)
#define CHECK_TEXT(actual, expected) check_text(__FILE__, __LINE__, actual, expected)

static inline void check_text(const char *file, int line, const char *actual, const char *expected)
{
    if (actual == expected || (actual && expected && !strcmp(actual, expected)))
        return;
    fprintf(stderr, "%s:%d: got '%s', expected '%s'\n", file, line, actual ? actual : "(null)", expected ? expected : "(null)");
    abort();
}

#endif
