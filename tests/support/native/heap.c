// Preloaded: counts the bytes that a process holds on its heap, and the most it held.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

static atomic_long g_live, g_peak;

static void* grown(void* data) {
  if (data == NULL) return NULL;
  const long live = atomic_fetch_add(&g_live, (long)malloc_usable_size(data)) +
                    (long)malloc_usable_size(data);
  long peak = atomic_load(&g_peak);
  while (live > peak && !atomic_compare_exchange_weak(&g_peak, &peak, live)) {
  }
  return data;
}
static void shrunk(void* data) {
  if (data != NULL) atomic_fetch_sub(&g_live, (long)malloc_usable_size(data));
}

void* malloc(size_t bytes) { return grown(__libc_malloc(bytes)); }
void* calloc(size_t count, size_t bytes) { return grown(__libc_calloc(count, bytes)); }
void* memalign(size_t unit, size_t bytes) { return grown(__libc_memalign(unit, bytes)); }
void* aligned_alloc(size_t unit, size_t bytes) { return grown(__libc_memalign(unit, bytes)); }
int posix_memalign(void** data, size_t unit, size_t bytes) {
  *data = memalign(unit, bytes);
  return *data == NULL ? ENOMEM : 0;
}
void* realloc(void* data, size_t bytes) {
  const long before = data == NULL ? 0 : (long)malloc_usable_size(data);
  void* moved = __libc_realloc(data, bytes);
  if (moved == NULL && bytes != 0) return NULL;
  atomic_fetch_sub(&g_live, before);
  return grown(moved);
}
void free(void* data) {
  shrunk(data);
  __libc_free(data);
}

// The bytes held now, from which the most is counted again.
long heap_restart(void) {
  const long live = atomic_load(&g_live);
  atomic_store(&g_peak, live);
  return live;
}
long heap_peak(void) { return atomic_load(&g_peak); }
