-- Tokens count as far as they are known: embeddings have a prompt and no completion. (greatest() passes over nulls.)
create or replace function public.counted_tokens(p_prompt bigint, p_completion bigint, p_estimate bigint) returns bigint
language sql immutable as $$
    select case when p_prompt is null and p_completion is null then p_estimate
                else least(greatest(coalesce(p_prompt, 0)::numeric + coalesce(p_completion, 0), 0), 1e12)::bigint end
$$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110700::bigint
$$;

notify pgrst, 'reload schema';
