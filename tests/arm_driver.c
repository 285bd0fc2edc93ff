/* Runs all tasks of one kernel on two threads: `driver IN OUT`; see tests/arm.py, which writes IN and reads OUT.

   Each piece of memory ends where a page begins that nothing may touch, and another lies in front of its own pages. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define THREADS 2

void worker(int64_t *fields);

static int64_t *fields;

static void *run(void *unused)
{
    worker(fields);
    return unused;
}

static char *guarded(size_t size)
{
    size_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page;
    char *pages = mmap(NULL, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE) || mprotect(pages + page + inner, page, PROT_NONE))
        exit(3);
    return pages + page + inner - size;
}

static void get(FILE *in, void *to, size_t size)
{
    if (fread(to, 1, size, in) != size)
        exit(4);
}

int main(int argc, char **argv)
{
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    int64_t counts[3]; /* of fields, pieces of memory, and fields that are addresses in them */
    if (argc != 3 || !in || !out)
        return 2;
    get(in, counts, sizeof counts);
    fields = calloc(counts[0], sizeof *fields);
    get(in, fields, counts[0] * sizeof *fields);
    char *pieces[counts[1] + 1];
    int64_t sizes[counts[1] + 1];
    get(in, sizes, counts[1] * sizeof *sizes);
    for (int i = 0; i < counts[1]; i++) {
        pieces[i] = guarded(sizes[i]);
        get(in, pieces[i], sizes[i]);
    }
    for (int i = 0; i < counts[2]; i++) {
        int64_t place[3]; /* which field, which piece, how many bytes into it */
        get(in, place, sizeof place);
        fields[place[0]] = (int64_t)(pieces[place[1]] + place[2]);
    }
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, run, NULL))
            return 5;
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < counts[1]; i++)
        if (fwrite(pieces[i], 1, sizes[i], out) != (size_t)sizes[i])
            return 6;
    return fclose(out);
}
