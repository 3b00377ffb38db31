"""What is supported, and the tests that show it. ci/support_matrix.py writes README.md's table from here.

Each line stays as long as its tests do: a name that no test has fails tests/python/test_readme.py.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = "vLLM's CPU engine"
CLASS = "the backend class"
CONFIG = "vLLM's configuration"


@dataclass(frozen=True)
class Row:
    what: str
    how: str  # on what it was proved, and what equals what
    tests: tuple[str, ...]  # file::function, under tests/


MODELS, IMPL, CONFIGS, PAGES = (f"engine/test_{name}.py::" for name in ("models", "impl", "engine_config", "page_plan"))
EXACT, CODEC = (
    f"{MODELS}test_float_pages_equal_the_stock_engine",
    f"{MODELS}test_compressed_pages_equal_the_reference_codec",
)

ROWS = (
    Row(
        "the presets, and formats of our own chosen beside one",
        f"{ENGINE}, equal to the reference codec; {CONFIG}",
        (
            "engine/test_engine.py::test_compressed_pages_equal_the_reference_codec",
            f"{CONFIGS}test_a_chosen_format_needs_no_native_layers",
            f"{CONFIGS}test_a_format_that_does_not_exist_is_refused",
        ),
    ),
    Row(
        "native first and last layers, layers to skip, an explicit `--attention-backend TURBOQUANT`",
        f"{ENGINE}; {CONFIG} and the CUDA platform's own selection for five compute capabilities",
        (
            "engine/test_engine.py::test_skip_layers_default_keeps_boundary_layers_native",
            f"{CONFIGS}test_an_explicit_flag_is_a_choice_per_layer_and_forces_no_flash_attention",
            f"{CONFIGS}test_the_cuda_platform_chooses_per_layer_under_an_explicit_flag",
        ),
    ),
    Row(
        "a preset that is known to lose accuracy on a model is named at start-up",
        f"{ENGINE}, a tiny Qwen2 with a large key bias",
        ("engine/test_accuracy.py::test_an_engine_names_its_preset_once",),
    ),
    Row(
        "a static offset is taken from keys with a large bias, with formats of our own",
        f"{ENGINE}, tiny models, equal to Hugging Face's own keys",
        (
            "engine/test_key_offsets.py::test_the_offset_is_the_mean_key_without_input",
            "engine/test_key_offsets.py::test_the_softmax_does_not_see_it",
        ),
    ),
    Row(
        "a model with a large key bias keeps its answers with formats of our own; layers that they do not hold stay native",
        f"{ENGINE}, the small model with a bias of 300 made by hand, on which turboquant_4bit_nc fails",
        (
            "engine/test_large_bias.py::test_a_preset_fails_and_formats_of_ours_hold",
            "engine/test_large_bias.py::test_a_layer_that_four_bits_do_not_hold_stays_native",
        ),
    ),
    Row(
        "layers that share a cache (Gemma 3n, Gemma 4)",
        f"{ENGINE}, tiny models; the skip list of Gemma 4 E4B from its config",
        (
            EXACT,
            f"{MODELS}test_skipped_layers_are_aligned_with_those_that_share_their_cache",
            f"{CONFIGS}test_layers_that_share_a_cache_keep_the_native_one_together",
        ),
    ),
    Row(
        "sliding windows beside full attention (Gemma 2, 3, 3n, 4, gpt-oss), pages freed behind them",
        f"{ENGINE}, equal to the stock engine; freed pages are poisoned",
        (EXACT, CODEC),
    ),
    Row(
        "layers that attend in chunks (Llama 4), native where they are skipped",
        f"{ENGINE}, equal to the stock engine; Llama 4 Scout's layers through vLLM's planning",
        (
            EXACT,
            CODEC,
            f"{MODELS}test_chunked_layers_are_native_where_vllm_skips_them",
            f"{PAGES}test_chunks_are_planned_where_native_layers_are_between",
        ),
    ),
    Row(
        "attention and a recurrent state in every layer (Falcon-H1)",
        f"{ENGINE}, equal to the stock engine; {CONFIG}",
        (EXACT, CODEC, f"{CONFIGS}test_a_hybrid_without_a_list_of_layer_types_is_served"),
    ),
    Row(
        "what is compressed against what was asked, in a line at start-up; nothing compressed (Falcon, four layers that are all "
        "skipped): a warning, and an error with `strict`",
        f"{ENGINE}; layers made of numbers",
        (
            f"{MODELS}test_nothing_compressed_is_said_and_an_error_with_strict",
            f"{PAGES}test_what_is_compressed_is_said_against_what_was_asked",
            f"{PAGES}test_an_engine_that_asks_gets_the_line_whatever_its_layers_are",
        ),
    ),
    Row(
        "a window that the user sets, by `hf_overrides` or `turboquant.sliding_window`",
        f"{ENGINE}, equal to a checkpoint with that window and unlike full attention",
        (
            f"{MODELS}test_a_window_of_the_users_is_in_force",
            f"{CONFIGS}test_a_window_that_no_layer_would_take_is_noticed",
        ),
    ),
    Row(
        "two head_dims (Gemma 4), recurrent layers (Qwen3-Next), a native layer beside them: pages of least memory",
        f"{ENGINE}, whose KV tokens are the planner's; 18 published configs through vLLM's planning",
        (
            f"{PAGES}test_the_engine_reports_the_planners_tokens",
            f"{PAGES}test_published_models_get_the_planners_pages",
            f"{PAGES}test_layers_without_any_plan_are_named",
            "python/test_plan_engine.py::test_kv_tokens_are_the_engines",
            "python/test_plan_engine.py::test_gemma_4_e4b_against_bf16",
        ),
    ),
    Row(
        "images whose tokens see each other (Gemma 3 with its vision tower; Gemma 4's clamped spans on the class)",
        f"{ENGINE}, equal to Hugging Face's eager model; {CLASS}, equal to attention by definition",
        (
            "engine/test_images.py::test_images_are_attended_in_both_directions",
            "engine/test_images.py::test_compressed_images_equal_the_reference_codec",
            f"{IMPL}test_images_are_seen_in_both_directions",
            f"{IMPL}test_the_builder_hands_images_on",
        ),
    ),
    Row(
        "sinks (gpt-oss), soft cap (Gemma 2), ALiBi (Bloom), head_dim 48",
        f"{ENGINE}, equal to the stock engine; {CLASS}, equal to the stock kernel",
        (
            EXACT,
            f"{IMPL}test_options_mean_what_the_stock_kernel_means",
            f"{IMPL}test_sinks_follow_their_weights_in_place",
        ),
    ),
    Row(
        "values narrower than keys",
        f"{ENGINE}, on a Llama of the test's own: vLLM's architectures with such values choose a backend that no CPU runs",
        (
            f"{MODELS}test_values_narrower_than_keys",
            f"{PAGES}test_a_backend_that_the_model_chose_is_not_run_over_our_pages",
        ),
    ),
    Row(
        "prefix caching, chunked prefill, mixed batches, preemption",
        f"{ENGINE}, equal to one prompt at a time",
        ("engine/test_scheduling.py::test_chunks_mixed_batches_prefix_hits_and_preemption", EXACT),
    ),
    Row(
        "speculation by n-grams and by a draft model",
        f"{ENGINE}, equal to a run without; not inside CUDA graphs",
        ("engine/test_scheduling.py::test_speculation_changes_no_greedy_token",),
    ),
    Row(
        "tensor parallel, pages split by KV head; context parallel refused",
        f"{ENGINE}, two workers equal to one; {CONFIG}",
        (
            "engine/test_tensor_parallel.py::test_pages_are_split_by_kv_head",
            f"{CONFIGS}test_what_is_not_served_is_refused_before_a_model_is_loaded",
        ),
    ),
    Row(
        "another TurboQuant plugin, a newer engine's keywords, a probe that fails, `strict`",
        f"processes of vLLM; {CLASS}",
        (
            f"{CONFIGS}test_another_plugin_is_named_before_it_brings_the_engine_down",
            f"{CONFIGS}test_keywords_of_a_newer_engine_are_passed_over_with_one_line_each",
            "engine/test_register.py::test_declining_is_said_and_stops_a_compressed_cache",
            "engine/test_register.py::test_strict_holds_where_the_adapter_breaks",
        ),
    ),
    Row(
        "no compiler at run time",
        f"{ENGINE} with stubs on PATH that note a call",
        ("engine/test_no_compiler.py::test_an_engine_runs_without_a_compiler",),
    ),
    Row(
        "MLA, encoders, other platforms: refused at start-up",
        CONFIG,
        (
            f"{CONFIGS}test_what_is_not_served_is_refused_before_a_model_is_loaded",
            f"{CONFIGS}test_bert_is_refused_at_the_configuration",
            f"{CONFIGS}test_another_platform_is_refused",
            f"{CONFIGS}test_the_stock_cpu_platform_is_refused",
        ),
    ),
    Row(
        "options of `--additional-config`",
        f"{ENGINE}; {CONFIG}",
        (
            "engine/test_engine.py::test_unknown_option_is_refused_with_the_nearest_name",
            "engine/test_register.py::test_options_are_checked",
            f"{CONFIGS}test_layers_that_do_not_exist_are_no_layers_to_skip",
            f"{CONFIGS}test_a_window_that_wraps_around_is_refused",
            f"{CONFIGS}test_options_in_a_configuration_made_otherwise_are_an_error",
        ),
    ),
    Row(
        "vLLM 0.33: registration, page sizes, the page plan, selection, refusals",
        "its Python without its kernels, beside 0.32's",
        (
            "engine/test_vllm_versions.py::test_the_other_vllm_passes_what_needs_no_engine",
            "engine/test_vllm_versions.py::test_registration_page_sizes_and_selection",
        ),
    ),
)
