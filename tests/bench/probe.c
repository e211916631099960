/* What the benchmark times, in C, so that the client's own overhead does not hide the difference between servers.
 *
 *   probe walk DIRECTORY                   list everything below and stat it
 *   probe read READERS LIST                open, read and close each file once; each reader has its own part of the list
 *   probe repeat OPERATION PASSES LIST     the operation on each path, PASSES times after one untimed pass
 *
 * LIST is a file of paths, each ended by NUL. OPERATION: open, openread, readlink, stat, listdir, missing.
 * Prints numbers: walk and read: nanoseconds, entries or files, bytes. repeat: nanoseconds per operation, of each pass.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20 };

static char *buffer;
static volatile uint64_t sink;

static uint64_t now_ns(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

struct list {
	size_t count;
	char **paths;
};

static struct list load(const char *name)
{
	int file = open(name, O_RDONLY | O_CLOEXEC);
	struct stat status;
	if (file < 0 || fstat(file, &status) < 0)
		err(2, "%s", name);
	size_t size = (size_t)status.st_size;
	char *text = malloc(size + 1);
	if (text == NULL || read(file, text, size) != (ssize_t)size)
		err(2, "%s", name);
	close(file);
	struct list list = {0, NULL};
	for (size_t at = 0; at < size; at++)
		list.count += text[at] == '\0';
	list.paths = calloc(list.count + 1, sizeof *list.paths);
	if (list.paths == NULL)
		err(2, "memory");
	for (size_t at = 0, index = 0; index < list.count; index++) {
		list.paths[index] = text + at;
		at += strlen(text + at) + 1;
	}
	return list;
}

static uint64_t read_whole(const char *path)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		err(2, "open %s", path);
	uint64_t total = 0;
	ssize_t got;
	while ((got = read(file, buffer, BUFFER_BYTES)) > 0)
		total += (uint64_t)got;
	if (got < 0)
		err(2, "read %s", path);
	close(file);
	return total;
}

static uint64_t walk(int parent, const char *name)
{
	int file = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	DIR *directory = file < 0 ? NULL : fdopendir(file);
	if (directory == NULL)
		err(2, "%s", name);
	uint64_t count = 0;
	struct dirent *entry;
	while ((errno = 0, entry = readdir(directory)) != NULL) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		struct stat status;
		if (fstatat(file, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) < 0)
			err(2, "stat %s", entry->d_name);
		count++;
		if (S_ISDIR(status.st_mode))
			count += walk(file, entry->d_name);
	}
	if (errno != 0)
		err(2, "readdir %s", name);
	closedir(directory);
	return count;
}

/* Each reader is a process, as the ranks of a job are. */
static void read_list(unsigned readers, struct list list)
{
	uint64_t *bytes = mmap(NULL, readers * sizeof *bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int gate[2];
	if (bytes == MAP_FAILED || pipe(gate) < 0)
		err(2, "set-up");
	for (unsigned reader = 0; reader < readers; reader++) {
		pid_t child = fork();
		if (child < 0)
			err(2, "fork");
		if (child == 0) {
			close(gate[1]);
			char byte;
			if (read(gate[0], &byte, 1) != 0)
				_exit(2);
			size_t stop = list.count * (reader + 1) / readers;
			uint64_t total = 0;
			for (size_t index = list.count * reader / readers; index < stop; index++)
				total += read_whole(list.paths[index]);
			bytes[reader] = total;
			_exit(0);
		}
	}
	close(gate[0]);
	uint64_t began = now_ns();
	close(gate[1]); /* end of file: they go */
	int status, failed = 0;
	while (wait(&status) > 0)
		failed |= status;
	uint64_t took = now_ns() - began, total = 0;
	if (failed)
		errx(2, "a reader failed");
	for (unsigned reader = 0; reader < readers; reader++)
		total += bytes[reader];
	printf("%llu %zu %llu\n", (unsigned long long)took, list.count, (unsigned long long)total);
}

static void do_open(const char *path)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		err(2, "open %s", path);
	close(file);
}

static void do_openread(const char *path)
{
	sink += read_whole(path);
}

static void do_readlink(const char *path)
{
	if (readlink(path, buffer, BUFFER_BYTES) < 0)
		err(2, "readlink %s", path);
}

static void do_stat(const char *path)
{
	struct stat status;
	if (lstat(path, &status) < 0)
		err(2, "stat %s", path);
	sink += (uint64_t)status.st_size;
}

static void do_listdir(const char *path)
{
	DIR *directory = opendir(path);
	if (directory == NULL)
		err(2, "opendir %s", path);
	while (readdir(directory) != NULL)
		sink++;
	closedir(directory);
}

static void do_missing(const char *path)
{
	if (access(path, F_OK) == 0)
		errx(2, "%s exists", path);
}

static const struct {
	const char *name;
	void (*work)(const char *);
} operations[] = {
	{"open", do_open}, {"openread", do_openread}, {"readlink", do_readlink},
	{"stat", do_stat}, {"listdir", do_listdir},   {"missing", do_missing},
};

static void repeat(const char *name, unsigned passes, struct list list)
{
	void (*work)(const char *) = NULL;
	for (size_t index = 0; index < sizeof operations / sizeof *operations; index++)
		if (strcmp(operations[index].name, name) == 0)
			work = operations[index].work;
	if (work == NULL || list.count == 0)
		errx(2, "no operation %s, or an empty list", name);
	for (unsigned pass = 0; pass <= passes; pass++) {
		uint64_t began = now_ns();
		for (size_t index = 0; index < list.count; index++)
			work(list.paths[index]);
		if (pass > 0)
			printf("%.1f ", (double)(now_ns() - began) / (double)list.count);
	}
	printf("\n");
}

int main(int argc, char **argv)
{
	buffer = malloc(BUFFER_BYTES);
	if (buffer == NULL)
		err(2, "memory");
	memset(buffer, 0, BUFFER_BYTES);
	if (argc == 3 && strcmp(argv[1], "walk") == 0) {
		uint64_t began = now_ns(), count = walk(AT_FDCWD, argv[2]);
		printf("%llu %llu 0\n", (unsigned long long)(now_ns() - began), (unsigned long long)count);
	} else if (argc == 4 && strcmp(argv[1], "read") == 0 && atoi(argv[2]) > 0) {
		read_list((unsigned)atoi(argv[2]), load(argv[3]));
	} else if (argc == 5 && strcmp(argv[1], "repeat") == 0 && atoi(argv[3]) > 0) {
		repeat(argv[2], (unsigned)atoi(argv[3]), load(argv[4]));
	} else {
		errx(2, "usage: see the source");
	}
	return 0;
}
