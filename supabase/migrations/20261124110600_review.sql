-- What keys that are handed out for trying things may not do to the others, and what of a webhook's URL stays in the log.

-- p: user_id (null: anybody's, for an administrator), maker_id (null: an administrator), key_id. A key of a lesser environment ends none of
-- a higher one, as it changes and rotates none. Outcomes: revoked, broader, not_found.
create or replace function public.revoke_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p || jsonb_build_object('user_id', coalesce((p ->> 'user_id')::bigint, (
        select k.user_id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint))));
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or (p ->> 'maker_id' is not null and v_maker.id is null) then
        return jsonb_build_object('outcome', 'not_found');
    elsif public.environment_rank(v_key.environment_tag) > public.environment_rank(v_maker.environment_tag) and v_maker.id is not null then
        return jsonb_build_object('outcome', 'broader', 'field', 'environment_tag');
    end if;
    update public.api_keys_new k set is_active = false, is_primary = false, revoked_at = clock_timestamp(), updated_at = clock_timestamp(),
        encrypted_key = null, previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'delete', v_key, jsonb_build_object('key_name', v_key.key_name));
    return jsonb_build_object('outcome', 'revoked', 'user_id', v_key.user_id, 'key_id', v_key.id);
end $$;

-- Of a URL only where it leads to: path and query often are a secret, and the log is for ever.
create or replace function public.audit_order(p jsonb, p_action text, p_target text, p_user_id bigint, p_details jsonb) returns void
language sql set search_path = '' as $$
    select public.write_audit(
        p ->> 'actor', p_action, p_target, p_user_id, (p ->> 'maker_id')::bigint, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid,
        case when p_details ? 'url' then jsonb_set(p_details, '{url}', to_jsonb(substring(p_details ->> 'url' from '^https://[^/?#]*')))
             else p_details end)
$$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110600::bigint
$$;

notify pgrst, 'reload schema';
