// Asks a GGUF model through llama.cpp's own library, and writes what it says as plain data:
//   llama_ask logits   MODEL ROWS OUT    fp32 logits of every token of every row, one after the other
//   llama_ask generate MODEL ROWS N      a line a row: up to N greedy tokens, ended by the first end-of-generation token
//   llama_ask tokenize MODEL TEXTS       a line a text (texts end in a zero byte): the model's own tokens of it
// ROWS has a line of token ids a row. The key-value cache is fp32 and flash attention is off, so that what differs from
// another program is the model's own arithmetic. LLAMA_ASK_THREADS says how many threads (1).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void fail(const std::string & what) {
    fprintf(stderr, "llama_ask: %s\n", what.c_str());
    exit(1);
}

static std::vector<std::vector<llama_token>> read_rows(const char * path) {
    std::ifstream file(path);
    std::vector<std::vector<llama_token>> rows;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        rows.emplace_back(std::istream_iterator<llama_token>(words), std::istream_iterator<llama_token>());
    }
    return rows;
}

static void decode(llama_context * ctx, const std::vector<llama_token> & tokens, int first, bool all) {
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = first + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = all || i + 1 == tokens.size();
    }
    batch.n_tokens = tokens.size();
    if (llama_decode(ctx, batch) != 0) fail("llama_decode failed");
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    if (argc < 4) fail("logits MODEL ROWS OUT | generate MODEL ROWS N | tokenize MODEL TEXTS");
    const std::string verb = argv[1];
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    // Weights as they lie in the file. Some virtual machines announce AMX and do not allow it: llama.cpp then dies in its
    // AMX kernels, with its own Q4_0 files too (llama-cli has --no-repack for this).
    model_params.use_extra_bufts = false;
    model_params.vocab_only = verb == "tokenize";
    llama_model * model = llama_model_load_from_file(argv[2], model_params);
    if (!model) fail("the model does not load");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    if (verb == "tokenize") {
        std::ifstream file(argv[3], std::ios::binary);
        for (std::string text; std::getline(file, text, '\0');) {
            std::vector<llama_token> ids(text.size() + 8);
            ids.resize(llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), true, true));
            for (llama_token id : ids) printf("%d ", id);
            printf("\n");
        }
        return 0;
    }
    if (argc < 5) fail("an argument is missing");
    const auto rows = read_rows(argv[3]);
    const int more = verb == "generate" ? atoi(argv[4]) : 0;
    size_t longest = 1;
    for (const auto & row : rows) longest = std::max(longest, row.size());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = longest + more;
    params.n_batch = params.n_ubatch = longest;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.n_threads = params.n_threads_batch = getenv("LLAMA_ASK_THREADS") ? atoi(getenv("LLAMA_ASK_THREADS")) : 1;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) fail("no context");
    const int columns = llama_vocab_n_tokens(vocab);
    FILE * out = verb == "logits" ? fopen(argv[4], "wb") : nullptr;
    for (const auto & row : rows) {
        llama_memory_clear(llama_get_memory(ctx), true);
        decode(ctx, row, 0, out != nullptr);
        for (size_t i = 0; out && i < row.size(); i++) fwrite(llama_get_logits_ith(ctx, i), sizeof(float), columns, out);
        for (int i = 0; i < more; i++) {
            const float * logits = llama_get_logits_ith(ctx, -1);
            llama_token best = 0;
            for (llama_token t = 1; t < columns; t++) best = logits[t] > logits[best] ? t : best;
            printf("%d ", best);
            if (llama_vocab_is_eog(vocab, best) || i + 1 == more) break;
            decode(ctx, {best}, row.size() + i, false);
        }
        if (!out) printf("\n");
    }
    if (out) fclose(out);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
