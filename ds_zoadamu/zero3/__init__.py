"""The seam to DeepSpeed: partitions, perturbed gathers, the optimizer that holds a rule, the engine's step.

What DeepSpeed 0.19.8 does not document is used in this package and nowhere else. Below is every such name with what it is for;
tests/zero3/test_deepspeed_names.py says which are gone when DeepSpeed changes, and that the list is whole.

parameter
    ds_tensor           this rank's partition, and for a gather the perturbed one in its place
    ds_numel            elements of the whole parameter
    ds_shape            its shape; of a 0-d parameter it is put right
    ds_status           whether it is gathered
    ds_id               it is partitioned
    ds_process_group    the ranks it is partitioned over
    all_gather          wrapped: a single gather
    all_gather_coalesced  wrapped: the coordinator's fetches and prefetches
    nvme_swapper        reads and writes its partition on NVMe
ds_tensor
    ds_numel            elements of the partition, padding included
    status              whether a partition on NVMe is in memory
    final_location      where it lies
nvme_swapper
    swap_in             reads partitions
    swap_out_and_release  writes one
    remove_partition_and_release_buffers  gives a buffer back
    synchronize_reads   waits for what is read ahead
    available_swap_in_buffers  how many are free
    param_buffer_count  how many there are
    swap_folder         where files of momentum go too
    dtype               of the buffers
    available_buffer_ids  emptied when the engine is destroyed
    aio_read_handle     frees the page-locked buffers then
    buffers             which DeepSpeed would keep
engine
    basic_optimizer     takes ours beside engine.optimizer
    tput_timer          takes our timer
    micro_steps         counted up to the last micro-batch of a step
    _config             timers_config
    _do_sanity_check    the first that sees the configuration: before it, ours
    _is_supported_optimizer  knows our rules too
    _configure_distributed_model  before it, models are refused
    _configure_optimizer  in its place, ours
    _configure_lr_scheduler  behind it, schedulers are refused
    _configure_zero_optimizer  without an optimizer it partitions for inference
    _check_for_duplicates  of parameters in groups
    _create_module_forward_pre_hook  in its place, one that does not keep the engine alive
    _create_module_forward_post_hook  likewise
    _forward_prologue   what that one calls
    _forward_epilogue   likewise
optimizer
    fp16_partitioned_groups_flat  of DeepSpeed's own optimizers, whose memory is compared: the weights
    fp32_partitioned_groups_flat  the master weights
    grad_partitions_flat_buffer  the partitions' gradients
    ipg_buckets         buffers in which gradients are reduced
offload
    partition_all_parameters  frees all gathered copies
    destroy             takes the hooks off the module
deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    NOT_AVAILABLE       of ds_status
deepspeed.runtime.swap_tensor.partitioned_param_swapper.PartitionedParamStatus
    AVAILABLE           of status
    NOT_AVAILABLE       of status; the third is a read on its way
deepspeed.runtime.zero.parameter_offload
    ZeROOrderedDict     parameters that are discovered where a forward of another part uses them
deepspeed.runtime.zero.offload_config.OffloadDeviceEnum
    nvme                of final_location
deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    fetch_sub_module    timed as the gathers of a step
deepspeed.runtime.constants
    ROUTE_TRAIN         the engine's own training data
deepspeed.utils.timer.ThroughputTimer
    start               overridden: a step has many forwards
deepspeed.ops
    __compatible_ops__  the shared-memory operator is left out
deepspeed.ops.op_builder.AsyncIOBuilder
    load                builds what reads and writes on NVMe
deepspeed.utils.comms_logging
    calc_bw_log         wrapped: it ends the process for an operation that it does not know
deepspeed.comm.comm
    comms_logger        the collectives of a step
"""
